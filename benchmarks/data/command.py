"""`python -m benchmarks data`: reading; with `--prepare` writing, `--entry` the first batch, `--remote` a store."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.data import entry, reading, remote, writing
from benchmarks.data.contest import CONTESTANTS
from benchmarks.data.source import KINDS


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.entry:
        entry.measure(options.rounds)
        return 0
    with _folder(options.folder) as folder:
        if options.remote:
            remote.measure(options.server, options.size_mb, options.rounds, options.delay_ms, options.step_ms, folder)
            return 0
        for kind in options.kinds.split(","):
            if kind not in KINDS:
                raise SystemExit(f"no kind {kind!r}; there are {', '.join(KINDS)}")
            if options.prepare:
                writing.measure(kind, options.size_mb, options.rounds, options.only, folder)
            else:
                reading.measure(kind, options.size_mb, options.rounds, options.only, folder, options.seconds)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="A,B", help="what is stored; both by default")
    parser.add_argument("--size-mb", type=int, default=256, help="of each kind, before it is stored")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of reading, at most; less when the epoch ends")
    names = ", ".join(contestant.name for contestant in CONTESTANTS)
    parser.add_argument("--only", default="", metavar="A,B", help=f"of {names}; memmap is needed for ratios")
    parser.add_argument(
        "--folder", default="", help="where datasets are written and kept (a temporary one: gone after)"
    )
    parser.add_argument("--prepare", action="store_true", help="measure writing only")
    parser.add_argument("--entry", action="store_true", help="measure the first batch of an epoch and of its middle")
    parser.add_argument("--remote", action="store_true", help="measure reading from a store with latency")
    parser.add_argument("--server", choices=remote.SERVERS, default="moto", help="the store, for --remote")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="latency of each request, for --remote")
    parser.add_argument("--step-ms", type=float, default=0.0, help="of a device that computes, for --remote")
    return parser


@contextlib.contextmanager
def _folder(named: str) -> Iterator[Path]:
    if named:
        yield Path(named).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        yield Path(folder)

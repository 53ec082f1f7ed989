"""A checkpoint's way to an S3 server on this machine, beside the same bytes sent by nothing but a client.

`raw N` is obstore's own upload in parts of 8 MiB, N at a time; the limit of a round is the fastest of them. `file` is
the stream that a rank writes its file to, digest included; `save` is the whole of it, from the call to the commit. The
server (moto's) shares the cores with all of them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.checkpoint.contestants.everstep import Everstep
from benchmarks.checkpoint.saver import make_state
from benchmarks.store import CREDENTIALS, s3_server
from benchmarks.table import machine, markdown, spread
from everstep.run_folder import RunFolder
from everstep.storage import open_storage
from everstep.trainer.checkpoint.run_folder_target import write_file

BUCKET = "bench"
PARALLEL = (1, 2, 4, 8, 16)
PART_BYTES = 8 * 2**20
HEAD = ("upload", "n", "seconds", "MB/s", "/ the best raw")
Once = Callable[[str], None]
"""Sends all bytes below a prefix of the bucket that nothing was sent to before."""


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    state = make_state(options.tensors)
    size_mb = sum(value.nbytes for value in state.values()) / 1e6
    data = memoryview(torch.cat([value.view(-1) for value in state.values()]).view(torch.uint8).numpy())  # type: ignore[arg-type]
    with s3_server(BUCKET) as url:
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=url)
        contestants: dict[str, Once] = {f"raw {count}": _raw(url, data, count) for count in PARALLEL}
        contestants |= {"file": _file(data), "save": _Save(options.tensors)}
        rounds = [_round(contestants, number) for number in range(options.rounds + 1)][1:]  # the first one warms up
    print(f"\n{size_mb:.0f} MB; {machine()}\n")
    print(markdown(HEAD, [_row(name, rounds, size_mb) for name in contestants]))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks upload", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=16, help="of 16 MB each")
    return parser


def _round(contestants: dict[str, Once], number: int) -> dict[str, float]:
    seen = {}
    for name, once in contestants.items():
        start = time.perf_counter()
        once(f"{number}-{name.replace(' ', '-')}")
        seen[name] = time.perf_counter() - start
        open_storage(f"s3://{BUCKET}").delete(f"{number}-{name.replace(' ', '-')}")  # the server keeps all in memory
    print("  ".join(f"{name} {seconds:.2f}" for name, seconds in seen.items()), flush=True)
    return seen


def _row(name: str, rounds: Sequence[dict[str, float]], size_mb: float) -> list[str]:
    def best(one: dict[str, float]) -> float:
        return min(seconds for other, seconds in one.items() if other.startswith("raw"))

    seconds = [one[name] for one in rounds]
    rates = [size_mb / each for each in seconds]
    return [name, str(len(rounds)), spread(seconds), spread(rates), spread([best(one) / one[name] for one in rounds])]


def _raw(url: str, data: memoryview, parallel: int) -> Once:
    import obstore
    from obstore.store import S3Store

    store = S3Store(BUCKET, endpoint=url, client_options={"allow_http": True, "timeout": "60s"})

    def once(prefix: str) -> None:
        obstore.put(store, f"{prefix}/bytes", data, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=parallel)

    return once


def _file(data: memoryview) -> Once:
    storage = open_storage(f"s3://{BUCKET}")

    def once(prefix: str) -> None:
        write_file(storage, f"{prefix}/bytes", data)

    return once


class _Save:
    """The checkpointer of the other benchmark, in a run folder of the bucket."""

    def __init__(self, tensors: int) -> None:
        self.everstep = Everstep(make_state(tensors))

    def __call__(self, prefix: str) -> None:
        checkpoints = self.everstep.checkpoints
        assert checkpoints is not None
        run = RunFolder(f"s3://{BUCKET}/{prefix}")
        run.claim({})
        checkpoints.folder = checkpoints.retention.folder = run
        checkpoints.state.progress.step += 1
        checkpoints.save()
        if not checkpoints.finish():
            raise SystemExit("the save has failed")

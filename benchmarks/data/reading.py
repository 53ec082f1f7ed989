"""Reading: samples a second, the first batch of an epoch, and the first one after a resume at 40 % of it.

Datasets are written once, then each round runs every contestant in a fresh process, one after the other. Ratios are to
`memmap` of the same round. The page cache is warm; files are read once before the clock starts. `shuffle` is the mean
distance of samples that follow one another, as they are stored, over their number: 0.333 where any may come next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import chosen
from benchmarks.data.contest import CONTESTANTS, WRITES_ALONE, WRITTEN_BY, Field
from benchmarks.table import figures, machine, markdown, ratios, spread

BATCHES = {"tokens": (8, 32), "bytes": (32,)}
BASE = "memmap"
HEAD = ("contestant", "n", "samples/s", "CPU, µs a sample", "first batch, s", "after resume, s", "resumes exactly",
        "shuffle", "max RSS, MB", "write, MB/s", "samples/s / memmap")  # fmt: skip
FIGURES = ("samples_per_s", "cpu_us", "first_s", "resume_s")

Seen = Mapping[str, Mapping[str, Any]]


def measure(kind: str, size_mb: int, rounds: int, only: str, folder: Path, seconds: float) -> None:
    """Print one table for each size of batch."""
    names = [contestant.name for contestant in CONTESTANTS if contestant.name not in WRITES_ALONE]
    contestants = chosen(only, names, CONTESTANTS)
    field = Field(kind, size_mb, folder)
    written = field.attempt([c for c in CONTESTANTS if c.name in _writers([c.name for c in contestants])], "write")
    for name, writer in WRITTEN_BY.items():
        if writer in field.absent:
            field.absent[name] = field.absent[writer]
    print(f"{kind}: " + "  ".join(f"{name} {one['write_mb_s']:.0f} MB/s" for name, one in written.items()), flush=True)
    for batch in BATCHES[kind]:
        stopped = field.attempt(contestants, "stop", BATCH=batch)
        seen = []
        for number in range(rounds):
            read = field.attempt(contestants, "read", BATCH=batch, SECONDS=seconds)
            resumed = field.attempt(contestants, "resume", BATCH=batch)
            seen.append({name: {**resumed[name], **one} for name, one in read.items() if name in resumed})
            told = "  ".join(f"{name} {one['samples_per_s']:.0f}" for name, one in seen[-1].items())
            print(f"round {number + 1}: {told}", flush=True)
        order = {name: _order(one, [each[name] for each in seen if name in each]) for name, one in stopped.items()}
        print(f"\n{kind}, {field.samples:,} samples of {size_mb} MB, batches of {batch}; {machine()}\n")
        print(markdown(HEAD, [_row(c.name, field, seen, written, order) for c in contestants]) + "\n", flush=True)
    for name, why in field.absent.items():
        print(f"{name}: {why}\n")


def _writers(names: list[str]) -> set[str]:
    return {WRITTEN_BY.get(name, name) for name in names}


def _order(stopped: Mapping[str, Any], resumed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the batches after the resume are those that would have come without it; how far the shuffle reaches."""
    same = [one["following"] == stopped["following"] for one in resumed]
    return ["yes" if all(same) else "no", f"{stopped['jump']:.3f}"]


def _row(name: str, field: Field, seen: Sequence[Seen], written: Seen, order: Mapping[str, list[str]]) -> list[str]:
    if name in field.absent:
        return [name, "0", f"not measured: {field.absent[name].splitlines()[-1][:80]}", *["–"] * (len(HEAD) - 3)]
    columns = {key: [{n: one[key] for n, one in each.items()} for each in seen] for key in (*FIGURES, "rss_mb")}
    speed = written.get(WRITTEN_BY.get(name, name))
    return [
        name,
        str(len(figures(columns["samples_per_s"], name))),
        *(spread(figures(columns[key], name), 4) for key in FIGURES),
        *order[name],
        spread(figures(columns["rss_mb"], name), 4),
        f"{speed['write_mb_s']:.0f}" if speed and name not in WRITTEN_BY else "–",
        spread(ratios(columns["samples_per_s"], name, BASE)),
    ]

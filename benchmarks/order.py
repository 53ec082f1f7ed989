"""What the sample order costs: entering it at a position, however far, and each sample in bulk.

Beside it stands the table of a whole epoch (`torch.randperm`), which is what a RandomSampler makes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.table import machine, markdown, spread
from everstep.trainer.data.loader import CHUNK
from everstep.trainer.data.ordering.order import SampleOrder

HEAD = ("samples", "enter at 0, µs", "enter at 10^12, µs", "in bulk, ns a sample",
        "randperm, ns a sample", "epoch's table, ms")  # fmt: skip
BATCH = 1024
FAR = 10**12


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    rows = [_row(samples, options.rounds) for samples in options.samples]
    print(f"entering: the ids of a batch of {BATCH}; in bulk: {CHUNK} at a time; {machine()}\n")
    print(markdown(HEAD, rows))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks order", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**5, 10**7, 10**9, 10**12])
    return parser


def _row(samples: int, rounds: int) -> list[str]:
    order = SampleOrder(samples, BATCH, seed=0)
    near = [_seconds(lambda: order.ids(0, BATCH)) for _ in range(rounds)]
    far = [_seconds(lambda: order.ids(FAR, BATCH)) for _ in range(rounds)]
    bulk = [_seconds(lambda: order.ids(0, CHUNK), 20) / CHUNK for _ in range(rounds)]
    fits = samples <= 10**7
    table = [_seconds(lambda: torch.randperm(samples), 1) for _ in range(3)] if fits else []
    return [
        f"{samples:.0e}",
        spread([1e6 * s for s in near]),
        spread([1e6 * s for s in far]),
        spread([1e9 * s for s in bulk]),
        spread([1e9 * s / samples for s in table]),
        spread([1e3 * s for s in table]) if fits else f"would need {samples * 8 / 2**30:.0f} GiB",
    ]


def _seconds(work: Callable[[], object], repeat: int = 50) -> float:
    """The median of `repeat` calls."""
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)

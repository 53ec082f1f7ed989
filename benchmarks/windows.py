"""What windows and lanes cost in shuffling and save in reading: strength, shards at hand, share of them per node.

1,024 shards of 512 samples, read by 16 processes; figures are of the order alone and the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from benchmarks.table import markdown
from everstep.trainer.data.ordering.order import OrderSource, SampleOrder, microbatches

SHARDS, ROWS, WORLD, WIDTH = 1024, 512, 16, 4
GLOBAL_BATCH = 256
HEAD = ("window, shards", "lanes", "mean distance of neighbours, of a full shuffle's", "shards a batch draws from",
        "shards read per node: of 2", "of 4", "of 8")  # fmt: skip
CASES = ((None, 1), (256, 1), (64, 1), (16, 1), (4, 1), (1, 1), (64, 16), (16, 16), (64, 8))


def main(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks windows", description=__doc__).parse_args(arguments)
    print(f"{SHARDS:,} shards of {ROWS} samples, global batch {GLOBAL_BATCH}, microbatch {WIDTH}, {WORLD} processes\n")
    print(markdown(HEAD, [_row(window, lanes) for window, lanes in CASES]))
    return 0


def _row(window: int | None, lanes: int) -> list[str]:
    order = SampleOrder([OrderSource([ROWS] * SHARDS)], GLOBAL_BATCH, 1, window=window, lanes=lanes, lane_width=WIDTH)
    ids = order.ids(0, SHARDS * ROWS)
    # Of a permutation of n, neighbours are a third of n apart on average.
    distance = 3 * np.abs(np.diff(ids)).mean() / len(ids)
    batches = ids.reshape(-1, GLOBAL_BATCH) // ROWS
    drawn = np.mean([len(np.unique(batch)) for batch in batches[:: len(batches) // 100]])
    shares = [f"{_share(order, nodes):.1%}" for nodes in (2, 4, 8)]
    return ["all" if window is None else str(window), str(lanes), f"{distance:.2f}", f"{drawn:.0f}", *shares]


def _share(order: SampleOrder, nodes: int) -> float:
    """Mean share of the shards that a node reads in the first epoch."""
    steps = np.arange(order.samples // GLOBAL_BATCH)[:, None] * GLOBAL_BATCH
    read = []
    for node in range(nodes):
        ranks = range(node * WORLD // nodes, (node + 1) * WORLD // nodes)
        slots = [slot for rank in ranks for slot in microbatches(GLOBAL_BATCH, WIDTH, rank, WORLD)]
        offsets = np.concatenate([np.arange(slot.start, slot.stop) for slot in slots])
        read.append(len(np.unique(order.at(0, steps + offsets)[1] // ROWS)) / SHARDS)
    return float(np.mean(read))

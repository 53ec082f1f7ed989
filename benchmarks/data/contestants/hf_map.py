"""Hugging Face datasets, map-style: Arrow files of 64 MB, under a StatefulDataLoader for order and position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import BLOCK, SHARD_BYTES, Source


class HfMap:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        torch.manual_seed(0)
        data = datasets.load_from_disk(str(folder))
        data, collate = (data.with_format("numpy"), blocks) if kind == "tokens" else (data, strings)
        self.loader = StatefulDataLoader(data, batch, shuffle=True, num_workers=0, collate_fn=collate)
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def state(self) -> Any:
        return self.loader.state_dict()

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        datasets.disable_progress_bars()
        table = pa.concat_tables([as_table(source, start, stop) for start, stop in source.pieces()])
        datasets.Dataset(table).save_to_disk(str(folder), max_shard_size=SHARD_BYTES)


def as_table(source: Source, start: int, stop: int) -> pa.Table:
    """By buffers, which is its fastest way in: lists of numbers through Python are some fifty times slower."""
    offsets = source.offsets[start : stop + 1]
    values = source.values[offsets[0] : offsets[-1]]
    if source.kind == "tokens":
        return pa.table({"sample": pa.FixedSizeListArray.from_arrays(pa.array(values), BLOCK)})
    buffers = [None, pa.py_buffer(offsets - offsets[0]), pa.py_buffer(values)]
    return pa.table({"sample": pa.Array.from_buffers(pa.large_binary(), stop - start, buffers)})


def blocks(samples: list[Any]) -> Any:
    return torch.from_numpy(np.stack([sample["sample"] for sample in samples]).astype(np.int64, copy=False))


def strings(samples: list[Any]) -> Any:
    return [sample["sample"] for sample in samples]


if __name__ == "__main__":
    serve(HfMap)

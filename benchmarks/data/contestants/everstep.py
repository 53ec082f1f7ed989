"""Everstep: Arrow shards, a shuffle of the whole dataset, and the loader without a thread."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from benchmarks.data.reader import Batch, Joined, serve
from benchmarks.data.source import Source
from everstep.config import LoaderConfig, OrderConfig
from everstep.dataset.prepare import prepare_frame
from everstep.dataset.shard_format import stored, table_of
from everstep.rank_env import RankInfo
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.columns import Columns, Ragged
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.loader import Loader
from everstep.trainer.data.ordering.order import OrderSource as Shards
from everstep.trainer.data.ordering.order import SampleOrder

NAME = "sample"


class Everstep:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        tokens = kind == "tokens"
        dataset = ArrowDataset(str(folder), cast={NAME: "int64"} if tokens else None)
        gather = Fetcher(dataset, seed=0, collate=None if tokens else joined)
        order = SampleOrder([Shards(dataset.shard_rows)], batch, seed=0, window=OrderConfig().window)
        self.loader = Loader(gather, order, batch, RankInfo(), "cpu", LoaderConfig(prefetch=0))
        self.step, self.last, self.tokens = state or 0, len(dataset) // batch, tokens

    def __iter__(self) -> Iterator[Batch]:
        # A run has no epochs: batches go on for ever, also across the end of one.
        for (microbatch,) in islice(self.loader.steps(self.step), self.last - self.step):
            self.step += 1
            batch = microbatch.batch
            yield batch[NAME] if self.tokens else Joined(batch["values"].numpy(), batch["offsets"].numpy())

    def state(self) -> Any:
        return self.step

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        # From memory, as the others are given it: reading a user's format would come on top.
        prepare_frame(as_table(source, 0, len(source)), str(folder), processes=2)


def joined(columns: Columns) -> dict[str, Tensor]:
    """Bytes as they come out of the gather: one buffer and where each sample begins."""
    column = columns[NAME]
    if not isinstance(column, Ragged):
        raise TypeError(f"{NAME} is not ragged")
    return {"values": column.values, "offsets": column.offsets}


def as_table(source: Source, start: int, stop: int) -> pa.Table:
    if source.kind == "tokens":
        return table_of({NAME: source.blocks[start:stop]})
    offsets = source.offsets[start : stop + 1]
    values = source.values[offsets[0] : offsets[-1]]
    buffers = [None, pa.py_buffer(offsets - offsets[0]), pa.py_buffer(values)]
    return pa.table({NAME: pa.Array.from_buffers(stored(pa.binary()), stop - start, buffers)})


if __name__ == "__main__":
    serve(Everstep)

"""Hugging Face datasets, iterable: the same files, shuffled by shard and through a buffer of 1,000 (its default)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from benchmarks.data.contestants.hf_map import HfMap
from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import Source


class HfIterable:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        stored = datasets.load_from_disk(str(folder))
        data = stored.to_iterable_dataset(num_shards=max(1, len(stored.cache_files))).shuffle(seed=0, buffer_size=1000)
        self.data, self.batch, self.kind = (data.with_format("numpy") if kind == "tokens" else data), batch, kind
        if state is not None:
            self.data.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data.iter(batch_size=self.batch):
            yield torch.from_numpy(np.asarray(batch["sample"], np.int64)) if self.kind == "tokens" else batch["sample"]

    def state(self) -> Any:
        return self.data.state_dict()

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        HfMap.write(source, folder)


if __name__ == "__main__":
    serve(HfIterable)

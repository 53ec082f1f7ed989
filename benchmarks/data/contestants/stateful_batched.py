"""The same with a gather of the whole batch (`__getitems__`), the best that can be had of a StatefulDataLoader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data.contestants.stateful import Blocks, Stateful, Strings
from benchmarks.data.reader import serve


class BlocksAtOnce(Blocks):
    def __getitems__(self, indices: list[int]) -> Any:
        return torch.from_numpy(self.blocks.take(indices, axis=0)).long()


class StringsAtOnce(Strings):
    def __getitems__(self, indices: list[int]) -> list[bytes]:
        starts, stops = self.offsets[indices].tolist(), self.offsets[np.add(indices, 1)].tolist()
        return [self.values[start:stop].tobytes() for start, stop in zip(starts, stops, strict=True)]


class StatefulBatched(Stateful):
    def dataset(self, folder: Path, kind: str) -> tuple[Any, Any]:
        return (BlocksAtOnce(folder) if kind == "tokens" else StringsAtOnce(folder)), as_it_comes


def as_it_comes(batch: Any) -> Any:
    return batch


if __name__ == "__main__":
    serve(StatefulBatched)

"""The same as one writes it at first: rows by indexing the map, then `astype`; a `bytes` object a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data.contestants.memmap import Memmap
from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import BLOCK


class MemmapPlain(Memmap):
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        super().__init__(folder, kind, batch, state)
        shape = (-1, BLOCK) if kind == "tokens" else (-1,)
        self.map = np.memmap(folder / "values.bin", np.uint16 if kind == "tokens" else np.uint8, "r").reshape(shape)

    def _blocks(self, ids: Any) -> Batch:
        return torch.from_numpy(self.map[ids].astype(np.int64))

    def _bytes(self, ids: Any) -> Batch:
        return [self.map[self.offsets[sample] : self.offsets[sample + 1]].tobytes() for sample in ids]


if __name__ == "__main__":
    serve(MemmapPlain)

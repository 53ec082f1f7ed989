"""The limit: a memory map, a random permutation of the whole epoch, and one gather a batch.

Tokens: NumPy's `take` of the rows, then to int64. Bytes: slices of the map joined into one buffer with offsets, which
is faster than a `bytes` object a sample.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data.reader import Batch, Joined, serve
from benchmarks.data.source import BLOCK, Source


class Memmap:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        self.batch, self.position, self.kind = batch, state or 0, kind
        if kind == "tokens":
            self.blocks = np.asarray(np.memmap(folder / "values.bin", dtype=np.uint16, mode="r")).reshape(-1, BLOCK)
            self.order = np.random.default_rng(0).permutation(len(self.blocks))
        else:
            with (folder / "values.bin").open("rb") as file:
                self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self.offsets = np.load(folder / "offsets.npy")
            self.order = np.random.default_rng(0).permutation(len(self.offsets) - 1)

    def __iter__(self) -> Iterator[Batch]:
        take = self._blocks if self.kind == "tokens" else self._bytes
        while self.position < len(self.order):
            ids = self.order[self.position : self.position + self.batch]
            self.position += len(ids)
            yield take(ids)

    def _blocks(self, ids: Any) -> Batch:
        return torch.from_numpy(self.blocks.take(ids, axis=0)).long()

    def _bytes(self, ids: Any) -> Batch:
        starts, stops = self.offsets[ids], self.offsets[ids + 1]
        joined = b"".join([self.bytes[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(stops - starts, out=offsets[1:])
        return Joined(np.frombuffer(joined, np.uint8), offsets)

    def state(self) -> Any:
        return self.position

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        source.values.tofile(folder / "values.bin")
        np.save(folder / "offsets.npy", source.offsets)


if __name__ == "__main__":
    serve(Memmap)

"""The samples that everybody stores: the same bytes for the same settings. Each begins with its own number.

`tokens`: blocks of 1,024 uint16, as a tokenised corpus is. `bytes`: 5 to 15 kB of noise, as compressed images are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("tokens", "bytes")
BLOCK = 1024
VOCABULARY = 50_257
SHARD_BYTES = 64 << 20
"""For all formats that have shards."""
_SMALLEST, _LARGEST = 5_000, 15_000
_AT_A_TIME = 1 << 14


@dataclass(frozen=True)
class Source:
    """Sample i is `values[offsets[i]:offsets[i + 1]]`; values are uint16 for tokens and uint8 for bytes."""

    kind: str
    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def blocks(self) -> NDArray[np.uint16]:
        """Tokens as [n, BLOCK]."""
        return self.values.reshape(-1, BLOCK)

    def sample(self, number: int) -> NDArray[Any]:
        start, stop = self.offsets[number : number + 2].tolist()
        return self.values[start:stop]

    def first(self, count: int) -> Source:
        offsets = self.offsets[: count + 1]
        return Source(self.kind, self.values[: offsets[-1]], offsets)

    def pieces(self) -> list[tuple[int, int]]:
        """Ranges of samples of about SHARD_BYTES each."""
        size = self.offsets * self.values.itemsize
        cuts = np.searchsorted(size, np.arange(SHARD_BYTES, size[-1], SHARD_BYTES)).tolist()
        bounds = [0, *cuts, len(self)]
        return [(start, stop) for start, stop in pairwise(bounds) if stop > start]


def make(kind: str, megabytes: int, folder: Path) -> None:
    """Write the samples to `folder` (values.bin, offsets.npy)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    total = megabytes << 20
    if kind == "tokens":
        lengths = np.full(total // (2 * BLOCK), BLOCK)
    else:
        lengths = rng.integers(_SMALLEST, _LARGEST, total // ((_SMALLEST + _LARGEST) // 2))
    offsets = np.cumsum([0, *lengths.tolist()])
    with (folder / "values.bin").open("wb") as file:
        for first in range(0, len(lengths), _AT_A_TIME):
            bounds = offsets[first : first + _AT_A_TIME + 1]
            file.write(_numbered(kind, rng, bounds - bounds[0], first).tobytes())
    np.save(folder / "offsets.npy", offsets)


def _numbered(kind: str, rng: np.random.Generator, offsets: NDArray[np.int64], first: int) -> NDArray[Any]:
    """Noise in which each sample begins with its number: two tokens, or eight bytes."""
    numbers = np.arange(first, first + len(offsets) - 1)
    if kind == "tokens":
        values: NDArray[Any] = rng.integers(0, VOCABULARY, offsets[-1], dtype=np.uint16)
        values[offsets[:-1]], values[offsets[:-1] + 1] = numbers & 0xFFFF, numbers >> 16
        return values
    noise = np.frombuffer(rng.bytes(int(offsets[-1])), np.uint8).copy()
    noise[offsets[:-1, None] + np.arange(8)] = numbers.astype("<u8").view(np.uint8).reshape(-1, 8)
    return noise


def load(kind: str, folder: Path) -> Source:
    """The samples of a folder, by memory map."""
    values = np.memmap(folder / "values.bin", dtype=np.uint16 if kind == "tokens" else np.uint8, mode="r")
    return Source(kind, np.asarray(values), np.load(folder / "offsets.npy"))

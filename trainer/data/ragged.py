"""Ragged columns: samples of different lengths in one batch, as their values end to end and offsets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.errors import DataError


@dataclass(slots=True)
class Ragged:
    """Sample i is `values[offsets[i]:offsets[i + 1]]`, as in Arrow and in torch's jagged nested tensors."""

    values: Tensor
    """All samples end to end; bytes and text are uint8."""
    offsets: Tensor
    """int64 [samples + 1] on the CPU."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        """Return the values of one sample, a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, stop = self.offsets[index : index + 2].tolist()
        return self.values[start:stop]

    def bytes(self, index: int) -> bytes:
        """Return one sample of a column of bytes or text."""
        return self[index].numpy().tobytes()

    @property
    def lengths(self) -> Tensor:
        """int64 [samples]."""
        return self.offsets.diff()

    def slice(self, start: int, stop: int) -> Ragged:
        """Return samples [start, stop), a view."""
        offsets = self.offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return Ragged(self.values[first:last], offsets - first)

    def split(self, sizes: list[int]) -> list[Ragged]:
        """Return the samples split into groups of these sizes, as views."""
        bounds = [0, *accumulate(sizes)]
        marks = self.offsets[bounds].tolist()
        pieces = zip(pairwise(bounds), pairwise(marks), strict=True)
        return [
            Ragged(self.values[first:last], self.offsets[start : stop + 1] - first)
            for (start, stop), (first, last) in pieces
        ]

    def select(self, rows: Tensor) -> Ragged:
        """Return the samples with these numbers, int64 [n], copied in this order."""
        kept = [self[row] for row in rows.tolist()]
        return Ragged.of(kept) if kept else Ragged(self.values[:0], self.offsets[:1] * 0)

    def to(self, *args: Any, **kwargs: Any) -> Ragged:
        """Convert the values to another device or type, like `Tensor.to`; the offsets stay on the CPU."""
        return Ragged(self.values.to(*args, **kwargs), self.offsets)

    @classmethod
    def of(cls, samples: list[Tensor]) -> Ragged:
        """Return one-dimensional tensors end to end."""
        lengths = torch.tensor([0, *(len(sample) for sample in samples)])
        return cls(torch.cat(samples) if samples else torch.empty(0), lengths.cumsum(0))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def values_of(column: Ragged) -> Tensor:
    """Return the values of all samples; a view may have others before and after them."""
    return column.values[int(column.offsets[0]) : int(column.offsets[-1])]


def counted_from_zero(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 … size - 1 for each of the sizes, end to end."""
    starts = np.cumsum(sizes) - sizes
    counted: NDArray[np.int64] = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    return counted


def bits_of(values: Tensor) -> NDArray[np.integer]:
    """Return the memory of a contiguous CPU tensor as integers."""
    return values.contiguous().view(_BITS[values.element_size()]).numpy()


def bit_pattern(value: float, dtype: torch.dtype, key: str, column: str) -> int:
    """Return the bits of `value` in `dtype` as an integer.

    Raises:
        DataError: the type cannot hold the value.
    """
    try:
        # torch wraps small negative numbers round in unsigned types without an error.
        held = torch.tensor(value, dtype=dtype)
        fits = dtype.is_floating_point or held.item() == value
    except (RuntimeError, OverflowError, TypeError, ValueError):
        fits = False
    if not fits:
        raise DataError(f"data.collate.{key}={value!r} does not fit column {column!r}, which is {dtype}")
    return int(held.view(_BITS[held.element_size()]).item())

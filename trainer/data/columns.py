"""Columns of a batch: tensors, ragged ones for samples of different lengths, and unusable rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.errors import DataError

ALONE_BYTES, TOGETHER_BYTES = 192 << 10, 1 << 20
"""A piece of at least the first size is gathered alone; smaller ones up to the second size together."""
SHOWN = 3
"""Rows that the message of `BadSamples` names; its `errors` has them all."""


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


Columns = dict[str, Tensor | Ragged]
"""Row i of each column belongs to one sample."""


class BadSamples(DataError):
    """Rows of a batch that do not decode, all of them at once: dropping these leaves a good batch.

    It holds rows only; the loader, which has the sample ids, adds dataset and shard or drops the samples.
    """

    def __init__(self, errors: Mapping[int, str]) -> None:
        self.errors = dict(sorted(errors.items()))
        """Row in the batch -> reason, in one line."""
        listed = "; ".join(f"row {row}: {why}" for row, why in list(self.errors.items())[:SHOWN])
        more = f"; and {len(self.errors) - SHOWN} more" if len(self.errors) > SHOWN else ""
        super().__init__(f"{len(self.errors)} of the batch's samples cannot be used: {listed}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is rebuilt from its message, and would lose the rows when it leaves a worker.
        return (type(self), (self.errors,))


def split(columns: Columns, bounds: Sequence[int]) -> Iterator[Columns]:
    """Yield the rows between each two bounds, as views."""
    names, sizes = list(columns), [stop - start for start, stop in pairwise(bounds)]
    parts = zip(*(column.split(sizes) for column in columns.values()), strict=True)
    return (dict(zip(names, values, strict=True)) for values in parts)


def pieces(gather: Callable[[int, int], Columns], bounds: Sequence[int], row_bytes: float) -> Iterator[Columns]:
    """Yield the rows between each two bounds, gathered with `gather(start, stop)`.

    Several small pieces share one call; large ones are gathered alone.

    A piece is gathered when it is requested, so that it is in the core's own cache when it is used.

    Args:
        row_bytes: size of a row of all columns; 0 gathers all pieces at once.
    """
    first, last = 0, len(bounds) - 1
    alone, together = (limit / row_bytes if row_bytes else bounds[-1] for limit in (ALONE_BYTES, TOGETHER_BYTES))
    while first < last:
        stop = first + 1
        if bounds[stop] - bounds[first] < alone:
            while stop < last and bounds[stop] - bounds[first] < together:
                stop += 1
        found = gather(bounds[first], bounds[stop])
        if stop == first + 1:
            yield found
        else:
            yield from split(found, [bound - bounds[first] for bound in bounds[first : stop + 1]])
        first = stop


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

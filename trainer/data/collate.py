"""Collation of samples of different lengths into tensors: padded, padded to few shapes, or packed.

Each collate is a pure function of the batch, so a microbatch has the same tensors on every rank and after every
restart. Names of keys in errors are those of the `data` node: `data.collate.…`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.errors import ConfigError, DataError
from everstep.trainer.data.columns import Ragged, bit_pattern, bits_of, counted_from_zero, values_of
from everstep.trainer.data.randomness import draws_nothing

Columns = Mapping[str, Tensor | Ragged]
"""Columns that the loader gathered; the classes here are `everstep.trainer.data.dataset.Collate`."""


@draws_nothing
class Pad:
    """Pad ragged columns to [n, longest] with `value` at the end, and add a column of their lengths.

    Args:
        columns: names of the columns; all ragged ones by default.
        value: the padding; by column if it differs ({labels: -100}; 0 for columns not named).
        multiple_of: the width is rounded up to a multiple of it.
        max_length: longer samples are truncated to it.
        lengths: name of the lengths, int64 [n]; `<column>_<lengths>` when several columns are padded.
    """

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        value: float | Mapping[str, float] = 0,
        multiple_of: int = 1,
        max_length: int | None = None,
        lengths: str = "lengths",
    ) -> None:
        _at_least_one("multiple_of", multiple_of)
        if max_length is not None:
            _at_least_one("max_length", max_length)
            if max_length % multiple_of:
                raise ConfigError(
                    f"data.collate.max_length={max_length} is not a multiple of data.collate.multiple_of={multiple_of}"
                )
        self.columns, self.value, self.lengths = columns, value, lengths
        self.multiple_of, self.max_length = multiple_of, max_length

    def __call__(self, batch: Columns) -> dict[str, Tensor]:
        """Return the padded batch; columns that are already tensors are not changed."""
        return _padded(batch, self.columns, self.value, self.lengths, self._width)

    def _width(self, name: str, longest: int) -> int:
        # A microbatch of empty samples still gets a width: most models refuse one of 0.
        if self.max_length is not None:
            longest = min(longest, self.max_length)
        return max(1, -(-longest // self.multiple_of)) * self.multiple_of


@draws_nothing
class Bucket:
    """`Pad` to the smallest of `boundaries` that holds the longest sample of the microbatch.

    So there are only as many shapes as boundaries, and tools that compile or tune by shape (torch.compile, cuDNN) do so
    only a few times.

    Args:
        boundaries: widths, in ascending order.
        truncate: truncate samples that are longer than the last boundary; otherwise they are an error.
        columns, value, lengths: as in `Pad`; each column has its own width.
    """

    def __init__(
        self,
        boundaries: Sequence[int],
        columns: Sequence[str] | None = None,
        value: float | Mapping[str, float] = 0,
        truncate: bool = False,
        lengths: str = "lengths",
    ) -> None:
        self.boundaries = list(boundaries)
        if not self.boundaries or self.boundaries != sorted({*self.boundaries}) or self.boundaries[0] < 1:
            raise ConfigError(f"data.collate.boundaries={self.boundaries} must be ascending widths of 1 or more")
        self.columns, self.value, self.truncate, self.lengths = columns, value, truncate, lengths

    def __call__(self, batch: Columns) -> dict[str, Tensor]:
        """Return the padded batch; columns that are already tensors are not changed."""
        return _padded(batch, self.columns, self.value, self.lengths, self._width)

    def _width(self, name: str, longest: int) -> int:
        for boundary in self.boundaries:
            if longest <= boundary:
                return boundary
        if self.truncate:
            return self.boundaries[-1]
        raise DataError(
            f"column {name!r} has a sample of {longest} values where the last of data.collate.boundaries is "
            f"{self.boundaries[-1]}; add a larger boundary, or cut such samples with data.collate.truncate=true"
        )


@draws_nothing
class Pack:
    """Pack samples end to end in rows of `length`, with almost no padding.

    Each sample goes, in order, into the first row with space for it (first fit). A sample that is longer than a row is
    split over rows of its own, of which the last is open to other samples; nothing is lost. Two columns are added:

    * `segments`: int32 [rows, length], the sample's number in the microbatch from 1, and 0 for padding;
    * `positions`: int64 [rows, length], from 0 in each row's part of a sample, so always below `length`.

    Args:
        length: values per row; for `LanguageModel` the model's context + 1.
        column: the column to pack. Other ragged columns of the same lengths (a mask, labels) are packed alike.
        separator: a value to end every sample with; None for samples that have their own, or need none.
    """

    def __init__(self, length: int, column: str = "tokens", separator: int | None = None) -> None:
        _at_least_one("length", length)
        self.length, self.column, self.separator = length, column, separator

    def __call__(self, batch: Columns) -> dict[str, Tensor]:
        """Return [rows, length] per column; the number of rows depends on the samples."""
        main = _ragged(batch, self.column)
        names = self._alike(batch, main)
        lengths = main.lengths.numpy()
        ended = {name: _ragged(batch, name) for name in names}
        if self.separator is not None:
            ended, lengths = {self.column: _with_separator(main, self.separator, self.column)}, lengths + 1
        places, segments, positions, rows = self._layout(lengths)
        packed = {name: self._moved(column, places, rows) for name, column in ended.items()}
        return {**packed, "segments": segments, "positions": positions}

    def _alike(self, batch: Columns, main: Ragged) -> list[str]:
        for name, column in batch.items():
            if name in ("segments", "positions"):
                raise DataError(f"column {name!r} is one that data.collate (Pack) makes; leave it out of the dataset")
            if not isinstance(column, Ragged) or not torch.equal(column.lengths, main.lengths):
                raise DataError(
                    f"column {name!r} has not the lengths of {self.column!r}, so it cannot be packed with it; "
                    "leave it out of the dataset, or choose another data.collate"
                )
        if self.separator is not None and len(batch) > 1:
            raise DataError(
                f"data.collate.separator={self.separator} ends {self.column!r}, but has no counterpart in "
                f"{', '.join(name for name in batch if name != self.column)}; write it into the dataset instead"
            )
        return list(batch)

    def _layout(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor, Tensor, int]:
        """Return the index of each value in the flat rows, segments, positions and the number of rows."""
        pieces, starts, rows = first_fit(lengths, self.length)
        owners = np.repeat(np.arange(len(lengths)), -(-lengths // self.length))
        within = counted_from_zero(pieces)
        places = np.repeat(starts, pieces) + within
        segments, positions = np.zeros(rows * self.length, np.int32), np.zeros(rows * self.length, np.int64)
        segments[places] = np.repeat(owners + 1, pieces)
        positions[places] = within
        shape = (rows, self.length)
        return places, torch.from_numpy(segments).view(shape), torch.from_numpy(positions).view(shape), rows

    def _moved(self, column: Ragged, places: NDArray[np.int64], rows: int) -> Tensor:
        values = values_of(column)
        out = torch.zeros(rows, self.length, dtype=values.dtype)
        bits_of(out).reshape(-1)[places] = bits_of(values)
        return out


@draws_nothing
class Segments:
    """Add `segments` and `positions` to blocks of several documents, each ended by a separator.

    The separator belongs to the document that it ends. Segments (int32) count from 1 in each row, positions (int64)
    from 0 in each document, or from the start of the row if the document began before it.
    """

    def __init__(self, separator: int, column: str = "tokens") -> None:
        self.separator, self.column = separator, column

    def __call__(self, batch: Columns) -> dict[str, Tensor]:
        """Return the batch and the two columns, shaped like `column`: [n, length]."""
        tokens = batch.get(self.column)
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise DataError(f"data.collate.column={self.column!r} must be blocks of one length; pack samples with Pack")
        _no_ragged_left(batch)
        ends = bits_of(tokens) == bit_pattern(self.separator, tokens.dtype, "separator", self.column)
        begins = np.zeros_like(ends)
        begins[:, 1:] = ends[:, :-1]
        columns = np.arange(tokens.shape[1])
        positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        segments = (1 + begins.cumsum(axis=1)).astype(np.int32)
        tensors = {name: column for name, column in batch.items() if isinstance(column, Tensor)}
        return {**tensors, "segments": torch.from_numpy(segments), "positions": torch.from_numpy(positions)}


def first_fit(lengths: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Place samples in rows of `length`: sizes and flat starts of their pieces, and the number of rows."""
    room = np.zeros(int((-(-lengths // length)).sum()), np.int64)
    sizes: list[int] = []
    starts: list[int] = []
    rows = 0
    for size in lengths.tolist():
        whole, rest = divmod(size, length)
        sizes += [length] * whole
        starts += range(rows * length, (rows + whole) * length, length)
        rows += whole
        if not rest:
            continue
        # The rest of a long sample opens a row, which keeps its pieces in order from row to row.
        fits = np.flatnonzero(room[:rows] >= (length + 1 if whole else rest))
        row = int(fits[0]) if fits.size else rows
        if row == rows:
            room[row], rows = length, rows + 1
        sizes.append(rest)
        starts.append((row + 1) * length - int(room[row]))
        room[row] -= rest
    return np.array(sizes, np.int64), np.array(starts, np.int64), rows


def _padded(
    batch: Columns,
    columns: Sequence[str] | None,
    value: float | Mapping[str, float],
    lengths: str,
    width_of: Callable[[str, int], int],
) -> dict[str, Tensor]:
    names = [name for name, column in batch.items() if isinstance(column, Ragged)] if columns is None else list(columns)
    out = {name: column for name, column in batch.items() if name not in names}
    for name in names:
        column = _ragged(batch, name)
        fill = value.get(name, 0) if isinstance(value, Mapping) else value
        told = lengths if len(names) == 1 else f"{name}_{lengths}"
        if told in batch or told in out:
            raise DataError(f"data.collate.lengths={lengths!r} would hide the column {told!r}; choose another name")
        sizes = column.lengths
        width = width_of(name, int(sizes.max()) if len(sizes) else 0)
        out[name], out[told] = _pad(column, sizes, width, fill, name), sizes.clamp(max=width)
    return _no_ragged_left(out)


def _pad(column: Ragged, lengths: Tensor, width: int, value: float, name: str) -> Tensor:
    values, sizes = values_of(column), lengths.numpy()
    out = torch.empty(len(column), width, dtype=values.dtype)
    bits, source = bits_of(out), bits_of(values)
    bits[...] = bit_pattern(value, values.dtype, "value", name)
    if len(sizes) and sizes.max() > width:
        source = source[counted_from_zero(sizes) < width]
    # The mask selects positions row by row, which is the order of the values.
    bits[np.arange(width) < sizes[:, None]] = source
    return out


def _with_separator(column: Ragged, separator: int, name: str) -> Ragged:
    values, count = values_of(column), len(column)
    offsets = column.offsets - column.offsets[0] + torch.arange(count + 1)
    out = torch.empty(len(values) + count, dtype=values.dtype)
    bits = bits_of(out)
    ends = np.zeros(len(out), bool)
    ends[(offsets[1:] - 1).numpy()] = True
    bits[ends] = bit_pattern(separator, values.dtype, "separator", name)
    bits[~ends] = bits_of(values)
    return Ragged(out, offsets)


def _ragged(batch: Columns, name: str) -> Ragged:
    column = batch.get(name)
    if column is None:
        raise DataError(f"data.collate names the column {name!r}; the dataset has {', '.join(batch)}")
    if not isinstance(column, Ragged):
        raise DataError(f"data.collate names the column {name!r}, whose samples are all of shape {[*column.shape[1:]]}")
    return column


def _no_ragged_left(batch: Columns) -> dict[str, Tensor]:
    out = {}
    for name, column in batch.items():
        if isinstance(column, Ragged):
            raise DataError(
                f"column {name!r} has samples of different lengths and data.collate leaves it so; "
                "name it in data.collate.columns, or leave it out of the dataset"
            )
        out[name] = column
    return out


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"data.collate.{key}={value} must be at least 1")

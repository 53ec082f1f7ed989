"""Arrow IPC shards as views of their memory map, checked before use.

Arrow does not check the lengths and offsets in a file, and a view made of wrong ones shows other memory of the
process. So every buffer is compared with the length of its column here, in O(1) a column; offsets are checked where
they are used (`gather_ragged`), and all of them by `check_offsets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from everstep.dataset.index import Column
from everstep.dataset.inflated_size import inflated_bytes
from everstep.dataset.shard_format import numpy_name, padded
from everstep.errors import DataError

FAULTS = (
    *(pa.ArrowException, ValueError, TypeError, KeyError, IndexError, OverflowError, OSError),
    MemoryError,  # a length of 2^60
    SystemError,  # a negative length
)
"""Errors that PyArrow and NumPy raise for a damaged file."""
LARGEST_INFLATED = 2 << 30
"""Bytes of a shard after decompression."""


class RaggedArray(NamedTuple):
    """Row i is `values[offsets[i]:offsets[i + 1]]`; both are views of the shard's memory map."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]


Stored = NDArray[Any] | RaggedArray


class Mapped(NamedTuple):
    """A shard's columns as views of its memory map, for each record batch."""

    rows: int
    columns: list[dict[str, Stored]]
    base: int
    """Address of the first byte of the map; an array's offset in the file is its own address less this."""

    @property
    def copied(self) -> bool:
        """True if some columns are copies: booleans, which Arrow packs in bits, and several batches."""
        return len(self.columns) != 1 or any(array[0].dtype == bool for array in self.columns[0].values() if len(array))

    def joined(self) -> dict[str, Stored]:
        """Return the columns as one array each.

        A shard of several record batches, from another tool, is copied to memory.
        """
        if len(self.columns) == 1:
            return self.columns[0]
        names = self.columns[0] if self.columns else ()
        return {name: _join([batch[name] for batch in self.columns]) for name in names}


def _join(pieces: list[Stored]) -> Stored:
    if not isinstance(pieces[0], RaggedArray):
        return np.concatenate(pieces)
    bounds = [piece.offsets[[0, -1]] for piece in pieces if isinstance(piece, RaggedArray)]
    values = [piece[0][first:last] for piece, (first, last) in zip(pieces, bounds, strict=True)]
    starts = np.cumsum([0, *(len(part) for part in values)])
    offsets = [piece[1][:-1] - first + start for piece, (first, _), start in zip(pieces, bounds, starts, strict=False)]
    return RaggedArray(np.concatenate(values), np.concatenate([*offsets, starts[-1:]]))


def inflate(path: str, to: str) -> None:
    """Write a compressed shard as one that can be mapped.

    Raises:
        DataError: its buffers declare more than LARGEST_INFLATED bytes, or it is damaged.
    """
    with pa.memory_map(path) as source, pa.OSFile(to, "wb") as target:
        whole = source.read_buffer(source.size())
        try:
            _check_inflated(whole, True)
        except ValueError as error:
            raise _damaged(path, error) from error
        reader = pa.ipc.open_file(whole)
        numbers = range(reader.num_record_batches)
        with pa.ipc.new_file(target, padded(reader.get_batch(0)) if numbers else reader.schema) as writer:
            for number in numbers:
                writer.write_batch(reader.get_batch(number))


def map_shard(path: str, columns: Mapping[str, Column], compressed: bool = False) -> Mapped:
    """Open a shard without reading its rows.

    Args:
        compressed: it may be compressed, and is then decompressed to memory.

    Raises:
        DataError: it is missing or damaged; the message is one line.
    """
    try:
        with pa.memory_map(path) as source:
            whole = source.read_buffer(source.size())
        _check_inflated(whole, compressed)
        reader = pa.ipc.open_file(whole)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        views = [{name: _view(path, name, batch, column) for name, column in columns.items()} for batch in batches]
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing; copy it back or prepare the dataset again") from None
    except FAULTS as error:
        raise _damaged(path, error) from error
    return Mapped(sum(batch.num_rows for batch in batches), views, whole.address)


def _check_inflated(whole: pa.Buffer, compressed: bool) -> None:
    """Raise ValueError if Arrow would decompress more than it may, before it does."""
    size = inflated_bytes(memoryview(whole))
    if size and not compressed:
        raise ValueError("it is compressed, and the index says that it is not")
    if size > LARGEST_INFLATED:
        raise ValueError(f"it would be {size} bytes decompressed (limit {LARGEST_INFLATED})")


def _damaged(path: str, error: BaseException) -> DataError:
    why = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"shard {path} is damaged ({why}); `everstep data verify` names all that are")


def check_offsets(path: str, mapped: Mapped) -> None:
    """Read all offsets of a shard's ragged columns.

    Raises:
        DataError: some lead out of the column, or backwards.
    """
    for batch in mapped.columns:
        for name, column in batch.items():
            if not isinstance(column, RaggedArray):
                continue
            offsets = column.offsets
            if offsets[0] < 0 or offsets[-1] > len(column.values) or (offsets[1:] < offsets[:-1]).any():
                raise DataError(
                    f"shard {path} is damaged: offsets of column {name!r} lead out of its {len(column.values)} values "
                    "or backwards; copy it back or prepare the dataset again"
                )


def _view(path: str, name: str, batch: pa.RecordBatch, column: Column) -> Stored:
    if name not in batch.schema.names:
        raise DataError(f"shard {path} has no column {name!r} that the index promises; prepare it again")
    values = batch.column(name)
    if len(values) != batch.num_rows:
        raise ValueError(f"column {name!r} has {len(values)} rows of {batch.num_rows}")
    if not _is_full(values):
        raise DataError(f"column {name!r} of {path} has empty values; fill or drop those rows")
    if column.ragged:
        return _ragged_view(path, name, values, column)
    while pa.types.is_fixed_size_list(values.type):
        size = values.type.list_size
        values = values.values.slice(values.offset * size, len(values) * size)  # flatten() imports pyarrow.compute
    return _checked(path, name, values, column).reshape(batch.num_rows, *column.shape)


def _is_full(values: pa.Array) -> bool:
    """True if no row is null; Arrow itself would count beyond the end of a bitmap that is too short."""
    bitmap = values.buffers()[0]
    if bitmap is not None and bitmap.size * 8 < values.offset + len(values):
        raise ValueError(f"a bitmap of {bitmap.size} bytes is too short for {len(values)} rows")
    return bool(values.null_count == 0)


def _ragged_view(path: str, name: str, values: pa.Array, column: Column) -> RaggedArray:
    kind = values.type
    is_list = pa.types.is_large_list(kind)
    if not (is_list or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"column {name!r} of {path} is {kind} where the index says {column.type}; prepare it again")
    offsets = values.buffers()[1]
    if not len(values):  # Arrow may store no offsets for no rows
        rows = np.zeros(1, np.int64)
    else:
        stop = values.offset + len(values) + 1
        rows = np.frombuffer(offsets if offsets is not None else b"", np.int64, count=stop)[values.offset :]
    if is_list:
        return RaggedArray(_checked(path, name, values.values, column), rows)
    data = values.buffers()[2]
    return RaggedArray(np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, np.uint8), rows)


def _checked(path: str, name: str, values: pa.Array, column: Column) -> NDArray[Any]:
    # PyArrow's own to_numpy imports pandas if that is installed, a quarter of a second before the first batch.
    kind, (start, stop) = values.type, (values.offset, values.offset + len(values))
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"column {name!r} of {path} is of type {kind}; only numbers, text and bytes train")
    if numpy_name(kind) != column.type:
        raise DataError(f"column {name!r} of {path} is {numpy_name(kind)} where the index says {column.type}")
    data = values.buffers()[1]
    if not len(values):
        return np.empty(0, column.type)
    if pa.types.is_boolean(kind):
        bits = np.frombuffer(data if data is not None else b"", np.uint8, count=-(-stop // 8))
        return np.unpackbits(bits, count=stop, bitorder="little")[start:].astype(bool)
    return np.frombuffer(data if data is not None else b"", column.type, count=stop)[start:]

"""Arrow IPC shards: written from Arrow tables or NumPy columns, read back as views of the memory map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from everstep.dataset.index import BYTES, PART_BYTES, TEXT, Column, Shard, part_digest
from everstep.errors import DataError
from everstep.storage import Storage

Arrays = Mapping[str, NDArray[Any]]
COMPRESSIONS = ("none", "lz4", "zstd")
_PADDING, _ALIGNMENT = b"everstep.padding", 64


class RaggedArray(NamedTuple):
    """Row i is `values[offsets[i]:offsets[i + 1]]`; both are views of the shard's memory map."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]


Stored = NDArray[Any] | RaggedArray


def write_shard(storage: Storage, file: str, rows: pa.Table, compression: str = "none") -> Shard:
    """Write one shard of one record batch; it appears whole, and durable on a local disk.

    Types are those that `stored` returns. The digests are computed while the bytes are written.
    """
    batch = pa.RecordBatch.from_arrays([_in_one(column) for column in rows.columns], schema=rows.schema)
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
    with storage.writer(file) as target:
        sink = _Digesting(target)
        schema = _padded(batch)
        with pa.PythonFile(sink, mode="w") as stream, pa.ipc.new_file(stream, schema, options=options) as writer:
            writer.write_batch(batch)
        parts = sink.finish()
    return Shard(file, rows.num_rows, sink.bytes, parts)


def _padded(batch: pa.RecordBatch) -> pa.Schema:
    """Return the batch's schema, padded so that the first column begins at a multiple of 64 bytes.

    The padding is blanks in the metadata. Arrow requires this alignment in memory but not in files; rows are copied out
    of an aligned map some 8 % faster.
    """
    schema = batch.schema.with_metadata({**(batch.schema.metadata or {}), _PADDING: ""})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.slice(0, 1))
    written = sink.getvalue()
    columns = pa.ipc.open_file(written).get_batch(0).columns
    starts = [buffer.address for column in columns for buffer in column.buffers() if buffer is not None]
    blanks = -(min(starts, default=written.address) - written.address) % _ALIGNMENT
    return schema.with_metadata({**schema.metadata, _PADDING: " " * blanks})


class _Digesting:
    """A stream that digests each part of the file on its way to `target`."""

    closed = False

    def __init__(self, target: IO[bytes]) -> None:
        self.bytes = 0
        self._target = target
        self._pending = bytearray()
        self._parts: list[str] = []

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._target.write(view)
        self.bytes += len(view)
        start = 0
        while len(self._pending) + len(view) - start >= PART_BYTES:
            stop = start + PART_BYTES - len(self._pending)
            # A part that is whole in the passed data is digested without a copy.
            part = view[start:stop] if not self._pending else self._pending + view[start:stop]
            self._parts.append(part_digest(part))
            self._pending = bytearray()
            start = stop
        self._pending += view[start:]
        return len(view)

    def finish(self) -> tuple[str, ...]:
        if self._pending:
            self._parts.append(part_digest(self._pending))
        return tuple(self._parts)

    def flush(self) -> None:
        """Do nothing: only digests are buffered."""

    def close(self) -> None:
        """Do nothing: the caller that opened the target closes it."""


def file_parts(path: str) -> tuple[str, ...]:
    """Return the digests of a file's parts."""
    found = []
    with open(path, "rb") as file:
        while part := file.read(PART_BYTES):
            found.append(part_digest(part))
    return tuple(found)


def table_of(arrays: Arrays) -> pa.Table:
    """Return a table of NumPy arrays [rows, …] of numbers, without a copy.

    Further dimensions become fixed-size lists.
    """
    return pa.table({name: _to_arrow(array) for name, array in arrays.items()})


def _to_arrow(array: NDArray[Any]) -> pa.Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype == bool or flat.dtype.kind in "mM":  # some types of time differ in memory from Arrow's
        values = pa.array(flat)
    else:
        values = pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])
    for size in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def _in_one(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def stored(kind: pa.DataType) -> pa.DataType:
    """Return the type in which a column of Arrow type `kind` is stored.

    Numbers and booleans as they are, times as int64, decimals as float64, text and bytes and lists with offsets of 64
    bits, fixed-size lists of any depth, dictionaries as their values.

    Raises:
        TypeError: the type cannot be used for training.
    """
    if pa.types.is_dictionary(kind):
        return stored(kind.value_type)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return kind
    if pa.types.is_temporal(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if pa.types.is_decimal(kind):
        return pa.float64()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_number(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_number(kind.value_type, nested=False))
    raise TypeError(f"a column of type {kind} cannot train")


def _number(kind: pa.DataType, nested: bool = True) -> pa.DataType:
    inner = stored(kind)
    if pa.types.is_fixed_size_list(inner) and nested:
        return inner
    if inner.num_fields or pa.types.is_large_string(inner) or pa.types.is_large_binary(inner):
        raise TypeError(f"lists of {kind} cannot train")
    return inner


def column_of(kind: pa.DataType) -> Column:
    """Return the index entry of a column that is stored as `kind`."""
    if pa.types.is_large_string(kind):
        return Column(TEXT, (None,))
    if pa.types.is_large_binary(kind):
        return Column(BYTES, (None,))
    if pa.types.is_large_list(kind):
        return Column(_numpy_name(kind.value_type), (None,))
    shape = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return Column(_numpy_name(kind), tuple(shape))


def _numpy_name(kind: pa.DataType) -> str:
    return str(np.dtype(kind.to_pandas_dtype()))


def columns_of(schema: pa.Schema) -> dict[str, Column]:
    """Return the index entries of a table with this schema."""
    return {field.name: column_of(field.type) for field in schema}


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
    """Write a compressed shard as one that can be mapped."""
    with pa.memory_map(path) as source, pa.OSFile(to, "wb") as target:
        reader = pa.ipc.open_file(source)
        numbers = range(reader.num_record_batches)
        with pa.ipc.new_file(target, _padded(reader.get_batch(0)) if numbers else reader.schema) as writer:
            for number in numbers:
                writer.write_batch(reader.get_batch(number))


def map_shard(path: str, columns: Mapping[str, Column]) -> Mapped:
    """Open a shard without reading its rows.

    Raises:
        DataError: it is missing or damaged; the message is one line.
    """
    try:
        with pa.memory_map(path) as source:
            whole = source.read_buffer(source.size())
        reader = pa.ipc.open_file(whole)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing; copy it back or prepare the dataset again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"shard {path} is damaged ({error}); `everstep data verify` tells which are") from error
    views = [{name: _view(path, name, batch, column) for name, column in columns.items()} for batch in batches]
    return Mapped(sum(batch.num_rows for batch in batches), views, whole.address)


def _view(path: str, name: str, batch: pa.RecordBatch, column: Column) -> Stored:
    if name not in batch.schema.names:
        raise DataError(f"shard {path} has no column {name!r} that the index promises; prepare it again")
    values = batch.column(name)
    if values.null_count:
        raise DataError(f"column {name!r} of {path} has empty values; fill or drop those rows")
    if column.ragged:
        return _ragged_view(path, name, values, column)
    while pa.types.is_fixed_size_list(values.type):
        size = values.type.list_size
        values = values.values.slice(values.offset * size, len(values) * size)  # flatten() imports pyarrow.compute
    return _checked(path, name, values, column).reshape(batch.num_rows, *column.shape)


def _ragged_view(path: str, name: str, values: pa.Array, column: Column) -> RaggedArray:
    kind = values.type
    if pa.types.is_large_list(kind):
        offsets = values.offsets.to_numpy(zero_copy_only=True)
        return RaggedArray(_checked(path, name, values.values, column), offsets)
    if not (pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"column {name!r} of {path} is {kind} where the index says {column.type}; prepare it again")
    _, offsets, data = values.buffers()
    rows = np.frombuffer(offsets, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    return RaggedArray(np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, np.uint8), rows)


def _checked(path: str, name: str, values: pa.Array, column: Column) -> NDArray[Any]:
    # PyArrow's own to_numpy imports pandas if that is installed, a quarter of a second before the first batch.
    kind, (start, stop) = values.type, (values.offset, values.offset + len(values))
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"column {name!r} of {path} is of type {kind}; only numbers, text and bytes train")
    if _numpy_name(kind) != column.type:
        raise DataError(f"column {name!r} of {path} is {_numpy_name(kind)} where the index says {column.type}")
    data = values.buffers()[1]
    if data is None or not len(values):
        return np.empty(0, column.type)
    if pa.types.is_boolean(kind):
        return np.unpackbits(np.frombuffer(data, np.uint8), count=stop, bitorder="little")[start:].astype(bool)
    return np.frombuffer(data, column.type, count=stop)[start:]

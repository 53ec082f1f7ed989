"""Arrow IPC shards, written from Arrow tables or NumPy columns; mapped_shard.py reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from everstep.dataset.index import BYTES, PART_BYTES, TEXT, Column, Shard, part_digest
from everstep.storage import Storage

Arrays = Mapping[str, NDArray[Any]]
COMPRESSIONS = ("none", "lz4", "zstd")
_PADDING, _ALIGNMENT = b"everstep.padding", 64


def write_shard(storage: Storage, file: str, rows: pa.Table, compression: str = "none") -> Shard:
    """Write one shard of one record batch; it appears whole, and durable on a local disk.

    Types are those that `stored` returns. The digests are computed while the bytes are written.
    """
    batch = pa.RecordBatch.from_arrays([_in_one(column) for column in rows.columns], schema=rows.schema)
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
    with storage.writer(file) as target:
        sink = _Digesting(target)
        schema = padded(batch)
        with pa.PythonFile(sink, mode="w") as stream, pa.ipc.new_file(stream, schema, options=options) as writer:
            writer.write_batch(batch)
        parts = sink.finish()
    return Shard(file, rows.num_rows, sink.bytes, parts)


def padded(batch: pa.RecordBatch) -> pa.Schema:
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
        return Column(numpy_name(kind.value_type), (None,))
    shape = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return Column(numpy_name(kind), tuple(shape))


def numpy_name(kind: pa.DataType) -> str:
    return str(np.dtype(kind.to_pandas_dtype()))


def columns_of(schema: pa.Schema) -> dict[str, Column]:
    """Return the index entries of a table with this schema."""
    return {field.name: column_of(field.type) for field in schema}

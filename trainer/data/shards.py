"""Arrow IPC shards: written from NumPy columns, read back as zero-copy NumPy views of the memory map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.data.index import Column, Shard
from trainer.errors import DataError

Columns = Mapping[str, NDArray[Any]]


def write_shard(folder: str, file: str, columns: Columns) -> Shard:
    """Write one shard of uncompressed record batches; `columns` are arrays [rows, …] of numbers.

    Each column is a FixedSizeList as deep as the sample's shape. The file is synced to disk.
    """
    table = pa.table({name: _to_arrow(array) for name, array in columns.items()})
    path = os.path.join(folder, file)
    with pa.OSFile(path, "wb") as sink:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        sink.flush()
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    return Shard(file, table.num_rows, os.path.getsize(path), file_digest(path))


def file_digest(path: str) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def column_of(array: NDArray[Any]) -> Column:
    """How the index describes a column with these samples in its first dimension."""
    return Column(str(array.dtype), array.shape[1:])


def read_pieces(path: str, columns: Mapping[str, Column]) -> list[dict[str, NDArray[Any]]]:
    """The record batches of a shard as NumPy views [rows, …] of its memory map; nothing is copied."""
    try:
        with pa.memory_map(path) as source:
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing; copy it back or prepare the dataset again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"shard {path} is damaged ({error}); `everstep data verify` tells which are") from error
    return [{name: _to_numpy(path, name, batch, column) for name, column in columns.items()} for batch in batches]


def _to_arrow(array: NDArray[Any]) -> pa.Array:
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    return values


def _to_numpy(path: str, name: str, batch: pa.RecordBatch, column: Column) -> NDArray[Any]:
    if name not in batch.schema.names:
        raise DataError(f"shard {path} has no column {name!r} that the index promises; prepare it again")
    values = batch.column(name)
    if values.null_count:
        raise DataError(f"column {name!r} of {path} has empty values; fill or drop those rows")
    while pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    try:
        flat: NDArray[Any] = values.to_numpy(zero_copy_only=not pa.types.is_boolean(values.type))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"column {name!r} of {path} is of type {values.type}; only numbers and fixed blocks train"
        ) from error
    if str(flat.dtype) != column.type:
        raise DataError(f"column {name!r} of {path} is {flat.dtype} where the index says {column.type}")
    return flat.reshape(batch.num_rows, *column.shape)

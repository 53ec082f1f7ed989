"""Cleaning: from rows as read to rows as stored; rows that do not fit are reported and left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from blake3 import blake3
from numpy.typing import NDArray

from everstep.dataset.prepare.exact_casts import cast_exactly
from everstep.dataset.readers.base import Bad, Chunk
from everstep.dataset.shard_format import stored
from everstep.errors import DataError, nearest

Digests = NDArray[np.uint64]
"""[rows, 2]: BLAKE3 of 128 bits for each row."""


def select(schema: pa.Schema, names: list[str]) -> pa.Schema:
    """Return the columns with these names.

    Raises:
        DataError: a column does not exist.
    """
    for name in names:
        if name not in schema.names:
            there = ", ".join(schema.names)
            raise DataError(f"src has no column {name!r}{nearest(name, schema.names)}; it has {there}")
    return pa.schema([schema.field(name) for name in names])


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema in which these columns are stored.

    Raises:
        DataError: a type cannot be used for training.
    """
    fields = []
    for field in schema:
        try:
            fields.append(pa.field(field.name, stored(_unwrapped(field.type))))
        except TypeError as error:
            others = [name for name in schema.names if name != field.name]
            raise DataError(f"column {field.name!r}: {error}; choose columns=[{','.join(others)}]") from error
    return pa.schema(fields)


def _unwrapped(kind: pa.DataType) -> pa.DataType:
    """Return the type of the bytes in Hugging Face's struct of bytes and path for images and audio."""
    if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        return kind.field("bytes").type
    return kind


def clean(chunk: Chunk, source: pa.Schema, target: pa.Schema, most: int) -> Chunk:
    """Return the rows in the types of `target` without those that do not fit.

    The search for such rows ends when there are more than `most`.
    """
    rows = chunk.rows
    wrong: dict[int, str] = {}
    columns: list[pa.Array] = []
    for via, to in zip(source, target, strict=True):
        column = _in_one(rows.column(via.name))
        column, found = _cast(via.name, column, _unwrapped(via.type), to.type, most)
        wrong = {**{row: f"column {via.name!r}: {reason}" for row, reason in found.items()}, **wrong}
        columns.append(column)
    if not wrong:
        return Chunk(pa.table(columns, schema=target), chunk.place, chunk.bad)
    bad = [Bad(chunk.place(row), wrong[row]) for row in sorted(wrong)]
    good = np.setdiff1d(np.arange(rows.num_rows), np.fromiter(wrong, np.int64))
    kept = Chunk(rows.take(pa.array(good)), lambda row: chunk.place(int(good[row])))
    again = clean(kept, source, target, most)
    return Chunk(again.rows, again.place, [*chunk.bad, *bad, *again.bad])


def _in_one(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _cast(name: str, column: pa.Array, via: pa.DataType, to: pa.DataType, most: int) -> tuple[pa.Array, dict[int, str]]:
    def build(part: pa.Array) -> pa.Array:
        if pa.types.is_struct(part.type):
            part = pc.struct_field(part, "bytes")
        if part.type == to:
            return part
        made = cast_exactly(part, to if pa.types.is_decimal(via) else via)
        # A time is stored as an integer: this cast changes the type, not the value.
        return made.cast(to) if pa.types.is_temporal(via) else cast_exactly(made, to)

    if not len(column):
        return pa.array([], to), {}
    try:
        converted = build(column)
    except NotImplementedError as error:
        raise DataError(f"column {name!r} of type {column.type} cannot become {via}; choose columns=[…]") from error
    except (TypeError, ValueError, OverflowError):
        return column, misfits(column, via, build, most)
    return converted, {int(row): "is null" for row in null_rows(converted)}


def misfits(values: Any, kind: pa.DataType, build: Callable[[Any], object], most: int = 1 << 60) -> dict[int, str]:
    """Return the rows of the values that `build` cannot make a `kind`, with the reason.

    Found by bisection, so that one in a million costs 20 builds; ends early when more than `most` are found.
    """
    found: dict[int, str] = {}
    parts = [(0, len(values))] if len(values) else []
    while parts and len(found) <= most:
        start, stop = parts.pop()
        try:
            build(values[start:stop])
        except (TypeError, ValueError, OverflowError) as error:
            if stop - start == 1:
                # Not the library's message, which quotes the value: data must not get into logs.
                found[start] = "is not UTF-8" if "UTF8" in str(error) else f"does not fit {kind}"
            else:
                middle = (start + stop) // 2
                parts += [(middle, stop), (start, middle)]
    return found


def null_rows(column: pa.Array) -> NDArray[np.int64]:
    """Return the rows that are null or lists with a null in them."""
    found = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)) if column.null_count else np.empty(0, int)
    if pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        inner = null_rows(pc.list_flatten(column))
        if len(inner):
            parents = pc.list_parent_indices(column).to_numpy()
            found = np.union1d(found, parents[inner])
    return found.astype(np.int64)


def row_digests(rows: pa.Table, names: list[str]) -> Digests:
    """Return a digest of each row's content in these columns."""
    found = [_digests(*row_bytes(_in_one(rows.column(name)))) for name in names]
    if len(found) == 1:
        return found[0]
    width = 16 * len(found)
    joined = np.concatenate(found, axis=1).view(np.uint8).reshape(-1)
    return _digests(joined, np.arange(0, len(joined) + 1, width, dtype=np.int64))


def _digests(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Digests:
    view, bounds = data.data, offsets.tolist()
    joined = b"".join(blake3(view[a:b]).digest(length=16) for a, b in itertools.pairwise(bounds))
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2).astype(np.uint64, copy=False)


def row_bytes(column: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the bytes of a stored column and the offset of each row; views if Arrow allows it."""
    kind = column.type
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        _, offsets, data = column.buffers()
        bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1] if offsets else [0]
        return np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), np.asarray(bounds, np.int64)
    if pa.types.is_large_list(kind):
        values = np.ascontiguousarray(column.values.to_numpy(zero_copy_only=False))
        return values.view(np.uint8), column.offsets.to_numpy() * values.itemsize
    rows = len(column)
    while pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    values = np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).view(np.uint8)
    return values, np.arange(rows + 1, dtype=np.int64) * (len(values) // max(1, rows))


def held_out(digests: Digests, fraction: float) -> NDArray[np.bool_]:
    """Return a mask of the rows of the validation set, which follows from their digests alone."""
    return digests[:, 0] < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))


def first_ones(digests: list[Digests]) -> list[NDArray[np.bool_]]:
    """Return a mask for each unit's rows: True if no earlier row has the same digest."""
    together = np.concatenate([*digests, np.empty((0, 2), np.uint64)])
    order = np.lexsort((together[:, 1], together[:, 0]))  # stable: of equal rows the first stays first
    ordered = together[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    kept = np.empty(len(order), dtype=bool)
    kept[order] = first
    return np.split(kept, np.cumsum([len(d) for d in digests])[:-1])

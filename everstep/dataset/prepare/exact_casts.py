"""Casts of Arrow columns that change no value."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def cast_exactly(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the column as `kind`; raise ValueError or TypeError if a value would become another one."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.type == kind:
        return column
    if _is_bytes(column.type) and not _is_bytes(kind):
        column = column.cast(pa.large_string())  # refuses bytes that are not UTF-8
    if not _go_together(column.type, kind):
        raise TypeError(f"{column.type} is no {kind}")
    if pa.types.is_decimal(column.type) and pa.types.is_floating(kind):
        column = column.cast(pa.string())  # by its digits: in a direct cast, PyArrow may miss the nearest float
        return _equal(column.cast(kind), column)
    made = column.cast(kind)
    before, after = _leaves(column), _leaves(made)
    if pa.types.is_floating(after.type) and before.type != after.type and not pa.types.is_null(before.type):
        _equal(after, before)
    return made


def _equal(made: pa.Array, given: pa.Array) -> pa.Array:
    """Return the cast column; raise ValueError unless a cast back gives the original column."""
    if pa.types.is_string(given.type):
        digits = pa.decimal256(76, 38)
        same = pc.equal(made.cast(pa.string()).cast(digits), given.cast(digits))
    else:
        back, given = _comparable(made.cast(given.type)), _comparable(given)
        same = pc.equal(back, given)
        if pa.types.is_floating(given.type):
            same = pc.or_(same, pc.and_(pc.is_nan(back), pc.is_nan(given)))
    if pc.all(same).as_py() is False:
        raise ValueError(f"{given.type} is rounded by {made.type}")
    return made


def _comparable(column: pa.Array) -> pa.Array:
    return column.cast(pa.float32()) if pa.types.is_float16(column.type) else column


def _leaves(column: pa.Array) -> pa.Array:
    """Return the elements of lists of any depth."""
    while _is_list(column.type):
        column = pc.list_flatten(column)
    return column


def _go_together(one: pa.DataType, other: pa.DataType) -> bool:
    """True if values of both types are of one kind.

    Kinds are boolean, number, text, time, and a list of one of these.
    """
    if pa.types.is_null(one):
        return True
    if _is_list(one) and _is_list(other):
        return _go_together(one.value_type, other.value_type)
    if pa.types.is_timestamp(one) and pa.types.is_timestamp(other):
        return (one.tz is None) == (other.tz is None)
    if pa.types.is_temporal(one):
        return bool(one.id == other.id)
    return bool(one == other or any(holds(one) and holds(other) for holds in (_is_text, _is_number)))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or _is_bytes(kind))

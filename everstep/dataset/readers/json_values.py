"""Rows of JSON objects: by PyArrow if that is exact, else one by one by Python's decoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from everstep.dataset.readers.type_inference import Values, as_float, fits, may_round


class Twice(dict[str, Any]):
    """Object that has a key twice."""


class Rows(NamedTuple):
    """Rows of a table, with their numbers among the values that were read."""

    table: pa.Table
    numbers: Sequence[int] | NDArray[np.int64]
    bad: dict[int, str]
    """Reasons why other values are not rows, by number."""


class Wanted(NamedTuple):
    """Columns to read."""

    schema: pa.Schema
    known: frozenset[str]
    """Columns that an object may have."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else Twice(made)


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def loaded(text: bytes) -> Any:
    """Return the object of a line, or the reason, as a string, why it is none."""
    try:
        return as_row(DECODER.decode(str(text, "utf-8").strip(" \t\r\n")))
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__}"


def as_row(value: Any) -> Any:
    """Return the object, or the reason, as a string, why it cannot be a row."""
    if isinstance(value, Twice):
        return "has a key twice"
    return value if isinstance(value, dict) else "is no JSON object"


def rows_of(values: Iterable[tuple[int, Any]], wanted: Wanted) -> Rows:
    """Return the rows of numbered values; those that a column does not hold exactly are bad."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    bad: dict[int, str] = {}
    for number, value in values:
        reason = value if isinstance(value, str) else _misfit(value, wanted)
        if reason:
            bad[number] = reason
        else:
            rows.append(value)
            numbers.append(number)
    columns = {
        field.name: pa.array([as_float(row.get(field.name), field.type) for row in rows], field.type)
        for field in wanted.schema
    }
    return Rows(pa.table(columns, schema=wanted.schema), numbers, bad)


def _misfit(row: dict[str, Any], wanted: Wanted) -> str:
    for field in wanted.schema:
        if not fits(row.get(field.name), field.type):
            return f"column {field.name!r}: does not fit {field.type}"
    late = next((name for name in row if name not in wanted.known), None) if wanted.known else None
    return f"has a column {late!r}, which comes too late to be seen; choose columns=" if late is not None else ""


def lines_of(block: bytes) -> Iterable[tuple[int, Any]]:
    """Yield (number, value) of a block's lines, without the empty ones."""
    return ((number, loaded(line)) for number, line in enumerate(block.split(b"\n")) if line.strip())


def read_lines(block: bytes, wanted: Wanted) -> Rows:
    """Return the rows of a block of lines."""
    filled = _filled(block)
    table = _by_arrow(block, filled, wanted)
    if table is not None:
        return Rows(table, filled, {})
    return rows_of(lines_of(block), wanted)


Seen = dict[str, Values]
"""Counts of the values of each column."""


def see(row: Any, found: Seen) -> None:
    """Count the values of an object."""
    if isinstance(row, dict):
        for name, value in row.items():
            found.setdefault(name, Values()).see(value)


class Guess:
    """Columns of earlier blocks: with their types given, PyArrow needs half the time."""

    wanted: Wanted | None = None

    def of(self, table: pa.Table) -> None:
        """Keep the columns of a block."""
        kinds = {
            field.name: pa.string() if pa.types.is_temporal(field.type) else field.type
            for field in table.schema
            if not pa.types.is_null(field.type)
        }
        self.wanted = Wanted(pa.schema(kinds), frozenset(kinds))


def see_lines(block: bytes, found: Seen, guess: Guess) -> None:
    """Count the values of a block of lines."""
    filled, before = _filled(block), guess.wanted
    table = _by_arrow(block, filled, before) if before is not None else None
    if table is None:
        table = _by_arrow(block, filled, None)
        if table is not None:
            guess.of(table)
    if table is None:
        for _, row in lines_of(block):
            see(row, found)
        return
    for name, column in zip(table.column_names, table.columns, strict=True):
        found.setdefault(name, Values()).see_column(column)


def _filled(block: bytes) -> NDArray[np.int64]:
    """Return the numbers of the lines that are not empty."""
    starts, letters = _line_starts(block)
    return np.flatnonzero((letters[starts] != ord("\n")) & (letters[starts] != ord("\r")))


def _line_starts(block: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    letters = np.frombuffer(block, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(letters == ord("\n")) + 1])
    return starts[starts < len(letters)], letters


def _by_arrow(block: bytes, filled: NDArray[np.int64], wanted: Wanted | None) -> pa.Table | None:
    """Return the block as PyArrow reads it; None if that is not exactly the content of its lines."""
    starts, letters = _line_starts(block)
    if (letters[starts[filled]] != ord("{")).any():  # PyArrow accepts more than objects, and crashes on null
        return None
    try:
        str(block, "utf-8")
        table = _read(block, wanted)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None  # a line is bad
    if table.num_rows != len(filled) or any(may_round(column) for column in table.columns):
        return None
    return table if wanted is None else table.select(wanted.schema.names)


def _read(block: bytes, wanted: Wanted | None) -> pa.Table:
    from pyarrow import json as arrow_json

    others = "infer" if wanted is None else "error" if wanted.known else "ignore"
    known = None if wanted is None else wanted.schema
    return arrow_json.read_json(
        pa.BufferReader(block),
        arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
        arrow_json.ParseOptions(explicit_schema=known, unexpected_field_behavior=others),
    )

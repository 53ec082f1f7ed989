"""Sources in memory: tables, documents, and rows of a generator."""

from __future__ import annotations

import datetime
import importlib
import itertools
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from everstep.dataset.prepare.exact_casts import cast_exactly
from everstep.dataset.readers.base import CHUNK_BYTES, Bad, Chunk, File, Piece, WholeFiles, refuse_twice, row_of
from everstep.dataset.readers.type_inference import HIGHEST
from everstep.dataset.shard_format import table_of
from everstep.errors import ConfigError, DataError
from everstep.import_path import import_from_here

T = TypeVar("T")
Row = Mapping[str, Any]
ROWS_AT_A_TIME = 1024
MISFITS = (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError)
"""Errors for values that do not fit one column."""


def in_memory(name: str, size: int = 0) -> File:
    """Return a source that is no file; its stamp is new each time, since a change cannot be detected."""
    return File(name, size, uuid.uuid4().hex, is_lasting=False)


class Table(WholeFiles):
    """Reads slices of a table without a copy."""

    stays = True

    def __init__(self, table: pa.Table) -> None:
        super().__init__()
        self._table = table

    def open(self, files: Sequence[File]) -> pa.Schema:
        refuse_twice(files[0], self._table.schema.names)
        return self._table.schema

    def cut(self, file: File, size: int) -> list[Piece]:
        rows = self._table.num_rows
        row = max(1, self._table.nbytes // max(1, rows))
        step = max(1, size // row)
        return [Piece(file, n, min(n + step, rows), (min(n + step, rows) - n) * row) for n in range(0, rows, step)]

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        stop = self._table.num_rows if piece.stop is None else piece.stop
        yield Chunk(self._table.slice(piece.start, stop - piece.start).select(schema.names), row_of(piece.file))


class Documents(WholeFiles):
    """Reads (name, content) pairs into the columns `bytes` and `name`."""

    stays = True
    content: tuple[str, ...] = ("bytes",)

    def __init__(self, documents: Iterable[tuple[str, bytes]]) -> None:
        super().__init__()
        self._documents = iter(documents)

    def open(self, files: Sequence[File]) -> pa.Schema:
        return pa.schema({"bytes": pa.large_binary(), "name": pa.string()})

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        while gathered := _gathered(self._documents, lambda document: len(document[1])):
            names, contents = zip(*gathered, strict=True)
            rows = pa.table({"bytes": pa.array(contents, pa.large_binary()), "name": pa.array(names, pa.string())})
            yield Chunk(rows, lambda row, names=names: str(names[row]))  # type: ignore[misc]


class Generator(WholeFiles):
    """Reads rows, as mappings of column to value, from a function.

    NumPy arrays keep their shape; lists may differ in length.
    """

    def __init__(self, function: str | Callable[[], Iterable[Row]]) -> None:
        super().__init__()
        self._function = function
        self.stays = callable(function)

    def open(self, files: Sequence[File]) -> pa.Schema:
        first = _gathered(self._rows(), _size)
        if not first:
            raise DataError(f"src={files[0].url} gives no rows")
        self.known = list(dict.fromkeys(name for row in first for name in row))
        return pa.schema([pa.field(name, type_of(name, [row.get(name) for row in first])) for name in self.known])

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        rows, done = self._rows(), 0
        known = set(self.allowed)
        while gathered := _gathered(rows, _size):
            bad: list[Bad] = []
            good = list(range(len(gathered)))
            try:
                if known and not all(row.keys() <= known for row in gathered):
                    raise ValueError("a column that is not known")
                table = table_of_rows(gathered, schema.names)
            except MISFITS:
                table, good, bad = _one_by_one(gathered, schema, known, row_of(piece.file, done))
            places = row_of(piece.file, done)
            yield Chunk(table, lambda row, places=places, good=good: places(good[row]), bad)  # type: ignore[misc]
            done += len(gathered)

    def _rows(self) -> Iterator[Row]:
        function = self._function if callable(self._function) else imported(self._function)
        for row in function():
            if not isinstance(row, Mapping):
                raise DataError(f"the generator yields {type(row).__name__}, not a mapping of column to value")
            yield row


def _gathered(rows: Iterator[T], size: Callable[[T], int]) -> list[T]:
    """Return the next rows: ROWS_AT_A_TIME, or fewer that have CHUNK_BYTES."""
    found: list[T] = []
    total = 0
    for row in itertools.islice(rows, ROWS_AT_A_TIME):
        found.append(row)
        total += size(row)
        if total >= CHUNK_BYTES:
            break
    return found


def _size(row: Row) -> int:
    """Return the approximate bytes of a row's values."""
    return sum(
        value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, str | bytes) else 8
        for value in row.values()
    )


def imported(name: str) -> Callable[[], Iterable[Row]]:
    """Return the function that `package.module:function` names; raise ConfigError if there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"src={name}: with format=generator write package.module:function")
    import_from_here()
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"src={name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"src={name} is {type(found).__name__}, not a function that gives rows")
    return found  # type: ignore[no-any-return]


def table_of_rows(rows: Sequence[Row], names: Sequence[str]) -> pa.Table:
    """Return a table of rows; raise one of MISFITS if their values do not fit one column."""
    return pa.table({name: _column([row[name] for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.ChunkedArray | pa.Array:
    if any(isinstance(value, np.ndarray) and value.ndim for value in values):
        return _stacked(values)
    _refuse_mixed(values)
    if all(type(value) is int for value in values) and max(values, default=0) > HIGHEST:
        return pa.array(values, pa.uint64())
    return pa.array(values)


def _stacked(values: list[Any]) -> pa.ChunkedArray:
    stacked = np.stack(values)
    for value in values:
        if value.dtype != stacked.dtype and not np.array_equal(stacked.dtype.type(value).astype(value.dtype), value):
            raise ValueError(f"{value.dtype} is rounded by {stacked.dtype}")
    return table_of({"": stacked}).column(0)


def _refuse_mixed(values: Iterable[Any]) -> None:
    """Raise TypeError for values of several kinds, which PyArrow would convert to one kind silently."""
    kinds = {_kind(value) for value in values if value is not None}
    if len(kinds) > 1 or "set" in kinds:
        raise TypeError(f"{', '.join(sorted(kinds))} are no one type")
    if kinds == {"list"}:
        _refuse_mixed(itertools.chain.from_iterable(value for value in values if value is not None))


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "bool"
    if isinstance(value, int | float | np.number):
        return "number"
    if isinstance(value, datetime.datetime):
        return "datetime" if value.tzinfo is None else "datetime with zone"
    if isinstance(value, list | tuple | np.ndarray):
        return "list"
    return "set" if isinstance(value, set | frozenset) else type(value).__name__


def type_of(name: str, values: list[Any]) -> pa.DataType:
    """Return the type of a column by its first values; of several kinds, the type of the most frequent."""
    there = [value for value in values if value is not None]
    try:
        return _column(there).type
    except MISFITS:
        pass  # `read_one` reports those that do not fit
    most = Counter(map(_kind, there)).most_common(1)[0][0]
    for value in there:
        if _kind(value) == most:
            try:
                return _column([value]).type
            except MISFITS:
                continue
    raise DataError(f"column {name!r} has values that cannot train, such as {type(there[0]).__name__}")


def _one_by_one(
    rows: list[Row], schema: pa.Schema, known: set[str], place: Callable[[int], str]
) -> tuple[pa.Table, list[int], list[Bad]]:
    """Return the rows that fit the schema, their numbers, and the other rows with the reasons."""
    tables, good, bad = [], [], []
    for number, row in enumerate(rows):
        late = next((name for name in row if known and name not in known), None)
        try:
            columns = [cast_exactly(_in_one(_column([row[field.name]])), field.type) for field in schema]
        except KeyError as error:
            bad.append(Bad(place(number), f"has no column {error}"))
        except MISFITS:
            bad.append(Bad(place(number), "does not fit the columns of the first"))
        else:
            if late is None:
                tables.append(pa.table(columns, schema=schema))
                good.append(number)
            else:
                bad.append(Bad(place(number), f"has a column {late!r}, which comes too late to be seen"))
    return pa.concat_tables(tables) if tables else schema.empty_table(), good, bad


def _in_one(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

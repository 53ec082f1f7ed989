"""What is in memory already, or is made on the way: tables, documents, and rows from a generator."""

from __future__ import annotations

import importlib
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from trainer.data.prepare.sources.source import CHUNK_BYTES, Bad, Chunk, File, Piece, WholeFiles, refuse_twice, row_of
from trainer.data.shards import table_of
from trainer.errors import ConfigError, DataError

T = TypeVar("T")
Row = Mapping[str, Any]
ROWS_AT_A_TIME = 1024


def in_memory(name: str, size: int = 0) -> File:
    """A source that is no file; nobody can tell whether it is the same as last time, so its stamp is new."""
    return File(name, size, uuid.uuid4().hex, is_lasting=False)


class Table(WholeFiles):
    """Reads slices of a table; nothing is copied."""

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
    """Reads rows, as mappings of column to value, from a function: NumPy arrays keep their shape, lists may differ."""

    def __init__(self, function: str | Callable[[], Iterable[Row]]) -> None:
        super().__init__()
        self._function = function
        self.stays = callable(function)

    def open(self, files: Sequence[File]) -> pa.Schema:
        first = _gathered(self._rows(), _size)
        if not first:
            raise DataError(f"src={files[0].url} gives no rows")
        return table_of_rows(first, list(first[0])).schema

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        rows, done = self._rows(), 0
        while gathered := _gathered(rows, _size):
            try:
                table = table_of_rows(gathered, schema.names)
                bad: list[Bad] = []
                good = list(range(len(gathered)))
            except (pa.ArrowException, ValueError, TypeError, KeyError):
                table, good, bad = _one_by_one(gathered, schema, piece.file, done)
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
    """The next rows: a thousand, or fewer that are large."""
    found: list[T] = []
    total = 0
    for row in itertools.islice(rows, ROWS_AT_A_TIME):
        found.append(row)
        total += size(row)
        if total >= CHUNK_BYTES:
            break
    return found


def _size(row: Row) -> int:
    """About how many bytes the values of a row take."""
    return sum(
        value.nbytes if isinstance(value, np.ndarray) else len(value) if isinstance(value, str | bytes) else 8
        for value in row.values()
    )


def imported(name: str) -> Callable[[], Iterable[Row]]:
    """The function that `package.module:function` names; ConfigError when there is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"src={name}: with format=generator write package.module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"src={name} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"src={name} is {type(found).__name__}, not a function that gives rows")
    return found  # type: ignore[no-any-return]


def table_of_rows(rows: Sequence[Row], names: Sequence[str]) -> pa.Table:
    """A table of rows; ValueError or ArrowInvalid where they do not go together."""
    return pa.table({name: _column([row[name] for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.ChunkedArray | pa.Array:
    if any(isinstance(value, np.ndarray) and value.ndim for value in values):
        return table_of({"": np.stack(values)}).column(0)
    return pa.array(values)


def _one_by_one(rows: list[Row], schema: pa.Schema, file: File, done: int) -> tuple[pa.Table, list[int], list[Bad]]:
    """The rows that go with the schema, and what is wrong with the others."""
    tables, good, bad = [], [], []
    for number, row in enumerate(rows):
        try:
            tables.append(table_of_rows([row], schema.names).cast(schema))
            good.append(number)
        except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
            reason = (
                f"has no column {error}" if isinstance(error, KeyError) else "does not fit the columns of the first"
            )
            bad.append(Bad(f"{file.url}: row {done + number + 1}", reason))
    return pa.concat_tables(tables) if tables else schema.empty_table(), good, bad

"""Folders named COLUMN=VALUE, the layout of Hive and Spark: each is a column of the rows below it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from everstep.dataset.readers.base import Bad, Chunk, File, Piece, Reader
from everstep.dataset.readers.csv_cells import is_whole
from everstep.errors import DataError

NULL = "__HIVE_DEFAULT_PARTITION__"


def parts_of(file: File) -> dict[str, str]:
    """Return column to value, by the folders COLUMN=VALUE of the file.

    These are the folders below the given one, the given one itself, and its parents up to the first with another name.
    """
    above = file.url.removesuffix(file.name).rstrip("/").split("/")
    named = itertools.takewhile(lambda folder: "=" in folder, reversed(above))
    folders = (folder.partition("=") for folder in (*reversed(list(named)), *file.name.split("/")[:-1]))
    return {unquote(name): unquote(value) for name, equals, value in folders if name and equals}


class Hive:
    """Adds the columns of the folders to the rows of another reader: whole numbers, or else text."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.stays, self.content = reader, reader.stays, reader.content
        self.problems: dict[str, str] = {}
        self._types: dict[str, pa.DataType] = {}
        self._inner = pa.schema([])

    @property
    def chosen(self) -> bool:
        return self.reader.chosen

    @chosen.setter
    def chosen(self, chosen: bool) -> None:
        self.reader.chosen = chosen

    def choose(self, files: Sequence[File]) -> list[File]:
        return self.reader.choose(files)

    def open(self, files: Sequence[File]) -> pa.Schema:
        self._inner = self.reader.open(files)
        self.content, self.problems = self.reader.content, self.reader.problems
        first = parts_of(files[0])
        for file in files:
            if set(parts_of(file)) != set(first):
                raise DataError(f"{file.url} and {files[0].url} differ in folders COLUMN=VALUE; choose a narrower src=")
        for name in first:
            values = {parts_of(file)[name] for file in files} - {NULL}
            self._types[name] = pa.int64() if values and all(map(is_whole, values)) else pa.string()
        added = [pa.field(name, kind) for name, kind in self._types.items() if name not in self._inner.names]
        return pa.schema([*self._inner, *added])

    def cut(self, file: File, size: int) -> list[Piece]:
        return self.reader.cut(file, size)

    def read(self, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[Chunk]:
        names = [name for name in schema.names if name in self._inner.names]
        # A reader needs at least one column to count rows.
        inner = pa.schema([self._inner.field(name) for name in names or self._inner.names[:1]])
        for piece in pieces:
            for chunk in self.reader.read([piece], inner):
                yield self._with_parts(chunk, piece.file, schema)

    def _with_parts(self, chunk: Chunk, file: File, schema: pa.Schema) -> Chunk:
        rows, bad = chunk.rows, list(chunk.bad)
        good = pa.array(range(rows.num_rows), pa.int64())
        for name, text in parts_of(file).items():
            if name not in schema.names:
                continue
            kind = self._types[name]
            value = None if text == NULL else int(text) if pa.types.is_int64(kind) else text
            if name not in rows.column_names:
                rows = rows.append_column(pa.field(name, kind), pa.repeat(pa.scalar(value, kind), rows.num_rows))
                continue
            same = [_text(cell) == text for cell in rows[name].to_pylist()]
            bad += [
                Bad(chunk.place(good[row].as_py()), f"column {name!r}: is not the {text} of its folder")
                for row, equal in enumerate(same)
                if not equal
            ]
            rows, good = rows.filter(pa.array(same, pa.bool_())), pc.filter(good, pa.array(same, pa.bool_()))
        return Chunk(rows.select(schema.names), lambda row: chunk.place(good[row].as_py()), bad)

    def attributes(self) -> dict[str, Any]:
        return self.reader.attributes()


def _text(value: Any) -> str:
    return NULL if value is None else value.decode(errors="replace") if isinstance(value, bytes) else str(value)

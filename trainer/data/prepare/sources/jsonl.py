"""JSON lines: PyArrow parses blocks at once; a block that it refuses is read line by line to tell which are bad."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from trainer.data.prepare.cleaning import misfits
from trainer.data.prepare.sources.lines import cut_lines, head_lines, line_at, line_blocks
from trainer.data.prepare.sources.source import Bad, Chunk, File, Piece, WholeFiles, spread
from trainer.errors import DataError


class JsonLines(WholeFiles):
    """Reads one JSON object a line; keys that are not wanted are passed over."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        return pa.schema([pa.field(f.name, _plain(f.type)) for f in _inferred(files)])

    def cut(self, file: File, size: int) -> list[Piece]:
        return cut_lines(file, size)

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        for offset, block in line_blocks(piece):
            yield _parsed(block, schema, line_at(piece.file, offset, block))


def _inferred(files: Sequence[File]) -> pa.Schema:
    """Columns and types by the beginnings of some files; a bad line among them is left to be told when it is read."""
    found = []
    for file in spread(files):
        head = head_lines(file)
        try:
            found.append(_arrow(head, None).schema)
        except pa.ArrowInvalid:
            good = [line for line in head.splitlines() if isinstance(_loaded(line), dict)]
            if good:
                found.append(_by_python([_loaded(line) for line in good]))
    if not found:
        raise DataError(f"{files[0].url} begins without one JSON object a line; set format=")
    try:
        return pa.unify_schemas(found, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"the files' columns are not of the same types: {str(error).splitlines()[0]}") from error


def _by_python(rows: list[dict[str, Any]]) -> pa.Schema:
    """The types of the first value of each key: the safe guess where values disagree."""
    first: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                first.setdefault(name, value)
    return pa.schema({name: pa.array([value]).type for name, value in first.items()})


def _plain(kind: pa.DataType) -> pa.DataType:
    """Text that looks like a time is text in JSON; a column of nothing but nulls could be any."""
    return pa.string() if pa.types.is_temporal(kind) or pa.types.is_null(kind) else kind


def _arrow(block: bytes, schema: pa.Schema | None) -> pa.Table:
    from pyarrow import json as arrow_json

    return arrow_json.read_json(
        pa.BufferReader(block),
        arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
        arrow_json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore"
        ),
    )


def _parsed(block: bytes, schema: pa.Schema, place: Callable[[int], str]) -> Chunk:
    try:
        str(block, "utf-8")
        rows = _arrow(block, schema)
        if rows.num_rows == block.count(b"\n") + (not block.endswith(b"\n")):
            return Chunk(rows, place)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        pass  # some line is bad: which one is found below
    return _line_by_line(block, schema, place)


def _line_by_line(block: bytes, schema: pa.Schema, place: Callable[[int], str]) -> Chunk:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    bad: dict[int, str] = {}
    for number, line in enumerate(block.split(b"\n")):
        if not line.strip():
            continue
        value = _loaded(line)
        if isinstance(value, dict):
            rows.append(value)
            lines.append(number)
        else:
            bad[number] = value
    for column in schema:
        values = [row.get(column.name) for row in rows]
        wrong = misfits(values, column.type, lambda part, kind=column.type: pa.array(part, kind))  # type: ignore[misc]
        for row, reason in sorted(wrong.items(), reverse=True):
            bad[lines[row]] = f"column {column.name!r}: {reason}"
            del rows[row], lines[row]
    columns = {c.name: pa.array([row.get(c.name) for row in rows], c.type) for c in schema}
    told = [Bad(place(number), bad[number]) for number in sorted(bad)]
    return Chunk(pa.table(columns), lambda row: place(lines[row]), told)


def _loaded(line: bytes) -> Any:
    """The value of a line, or a string that says why there is none."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        return "is not UTF-8"
    except ValueError as error:
        return f"is no JSON: {error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__}"
    return value if isinstance(value, dict) else "is no JSON object"

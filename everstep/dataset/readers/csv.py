"""Reader of CSV and TSV: a file is one piece, streamed; all cells of a column determine its type.

A cell of another type makes its row bad.
"""

from __future__ import annotations

import csv as python_csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from everstep.dataset.readers.base import (
    LOOK_BYTES,
    Bad,
    Chunk,
    File,
    Piece,
    WholeFiles,
    all_columns,
    ended_early,
    looked_at,
    refuse_others,
    refuse_twice,
)
from everstep.dataset.readers.csv_cells import Cells, see, typed
from everstep.dataset.readers.streams import CutShortError, open_text, suffix_of
from everstep.dataset.readers.type_inference import in_all
from everstep.errors import DataError

BLOCK = 8 << 20
TABS = (".tsv", ".tab")
END = b"\x02everstep end of file\x03"
"""Cells of a row that is added if a quote may be open: if it is, they become part of a cell."""


class Csv(WholeFiles):
    """Reads files whose first line names the columns."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        chosen = [piece.file for piece in looked_at([Piece(file, size=file.size) for file in files])]
        headers = [(file, names) for file in chosen if (names := _known_header(file))]
        if not headers:
            _header(files[0])  # raises the reason
            raise DataError(f"{files[0].url} is no CSV file: it is empty; set src=")
        self.known, self.problems = all_columns(headers)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = pool.map(lambda one: _seen(*one), headers)
            columns = in_all(zip((file.url for file, _ in headers), found, strict=True), Cells)
        return pa.schema([pa.field(name, columns[name].type) for name in self.known])

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        file, row = piece.file, 0
        skipped: list[int] = []
        bad: list[Bad] = []
        try:
            names = _header(file)
            if names:
                refuse_others(file, names, schema.names, self.allowed)
            for cells in _batches(file, names, schema.names, bad, skipped):
                found, bad[:] = list(bad), []
                yield _cast(Chunk(cells, _row_of(file, row, skipped), found), schema)
                row += cells.num_rows
        except CutShortError as error:
            yield ended_early(file, error, row, schema)
        if bad:
            yield Chunk(schema.empty_table(), _row_of(file, row, skipped), bad)


def _known_header(file: File) -> list[str]:
    try:
        return _header(file)
    except CutShortError:
        return []  # `read_one` reports it


def _header(file: File) -> list[str]:
    """Return the names of the columns; none for an empty file."""
    with open_text(file) as stream:
        head = stream.read(BLOCK)
    text = io.StringIO(head.decode(errors="surrogateescape"), newline="")
    try:
        names = next((names for names in python_csv.reader(text, delimiter=_delimiter(file)) if names), [])
    except python_csv.Error as error:
        raise DataError(f"{file.url} is no CSV file: {error}") from error
    if any("\ud800" <= letter <= "\udfff" for name in names for letter in name):
        raise DataError(f"{file.url}: its first line, which names the columns, is not UTF-8; convert the file")
    refuse_twice(file, names)
    return names


def _seen(file: File, names: list[str]) -> dict[str, Cells]:
    found = {name: Cells() for name in names}
    size = 0
    try:
        for batch in _batches(file, names, names, [], []):
            for name in names:
                see(batch.column(name).combine_chunks(), found[name])
            size += batch.nbytes
            if size > LOOK_BYTES:
                break
    except CutShortError:
        pass  # `read_one` reports it
    return found


def _batches(file: File, names: list[str], wanted: list[str], bad: list[Bad], skipped: list[int]) -> Iterator[pa.Table]:
    """Yield the cells as bytes, a type that fits every cell."""
    from pyarrow import csv

    kinds = {name: pa.large_binary() for name in names}
    convert = csv.ConvertOptions(column_types=kinds, include_columns=wanted)
    read = csv.ReadOptions(use_threads=False, block_size=BLOCK)
    row, last = 0, None
    with open_text(file) as text:
        stream = _Blocks(text, len(names), _delimiter(file))
        try:
            for batch in csv.open_csv(
                pa.PythonFile(stream, mode="r"), read, _parse_options(file, bad, skipped), convert
            ):
                if last is not None:
                    yield last
                last = pa.table(batch)
                row += last.num_rows
        except pa.ArrowInvalid as error:
            if "Empty CSV" not in str(error):  # PyArrow's message for a header alone
                reason = str(error).splitlines()[0]
                if "straddl" in reason:
                    reason = f"a row is larger than {BLOCK >> 20} MiB, or its quote is not closed, which is the limit"
                raise DataError(f"{file.url} after row {row}: {reason}") from error
    if last is not None and stream.marked:
        last = _without_end(last, file, row + len(skipped), bad, skipped)
    if last is not None:
        yield last


def _without_end(last: pa.Table, file: File, row: int, bad: list[Bad], skipped: list[int]) -> pa.Table:
    """Return the last rows without the row of END, or without the row whose quote is open."""
    rest = last.slice(0, last.num_rows - 1)
    if all(column[-1].as_py() == END for column in last.columns):
        return rest
    if skipped and skipped[-1] >= row:
        return last  # bad already, as a row with a wrong number of cells
    bad.append(Bad(f"{file.url}: row {row}", "has a quote that is not closed"))
    return rest


class _Blocks:
    """Stream of text for PyArrow by whole lines.

    PyArrow loses bytes if a CRLF is divided between two blocks.
    """

    closed = False

    def __init__(self, stream: Any, columns: int, delimiter: str) -> None:
        self._stream, self._pending, self._quotes, self.marked = stream, b"", 0, False
        self._end = b"\n" + delimiter.encode().join([END] * columns) + b"\n"

    def read(self, size: int = -1) -> bytes:
        data, more = self._pending, b""
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        end = _line_end(data) if more else len(data)
        data, self._pending = data[:end], data[end:]
        self._quotes += data.count(b'"')
        if not data and self._quotes % 2 and not self.marked:
            self.marked = True
            return self._end
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def _line_end(data: bytes) -> int:
    """Return the end of the last whole line; without one, that of the data."""
    return data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, -1) + 1 or len(data.rstrip(b"\r")) or len(data)


def _cast(cells: Chunk, schema: pa.Schema) -> Chunk:
    """Return the rows with the types of their columns; a row with a cell of another type is bad."""
    columns: list[pa.Array] = []
    wrong: dict[int, str] = {}
    for field in schema:
        column, fits = typed(cells.rows.column(field.name).combine_chunks(), field.type)
        columns.append(column)
        for row in pc.indices_nonzero(pc.invert(fits)).to_pylist():
            wrong.setdefault(row, f"column {field.name!r}: does not fit {field.type}")
    rows = pa.table(columns, names=schema.names)
    if not wrong:
        return cells._replace(rows=rows)
    good = [row for row in range(rows.num_rows) if row not in wrong]
    bad = [Bad(cells.place(row), wrong[row]) for row in sorted(wrong)]
    return Chunk(rows.take(pa.array(good, pa.int64())), lambda row: cells.place(good[row]), [*cells.bad, *bad])


def _row_of(file: File, first: int, skipped: list[int]) -> Callable[[int], str]:
    """Return a function that names rows by their number in the file, in which some rows were not parsed."""

    def place(row: int) -> str:
        number = first + row + 1
        for other in skipped:
            number += other <= number
        return f"{file.url}: row {number}"

    return place


def _delimiter(file: File) -> str:
    return "\t" if suffix_of(file) in TABS else ","


def _parse_options(file: File, bad: list[Bad], skipped: list[int]) -> Any:
    from pyarrow import csv

    def invalid(row: Any) -> str:
        skipped.append(row.number - 1)
        bad.append(
            Bad(
                f"{file.url}: row {row.number - 1}",
                f"has {row.actual_columns} cells where the header names {row.expected_columns}",
            )
        )
        return "skip"

    return csv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True, invalid_row_handler=invalid)

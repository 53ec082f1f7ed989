"""CSV and TSV: a file is one piece, streamed; cells are cast afterwards, so that a bad one is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from trainer.data.prepare.sources.lines import head_lines, open_text
from trainer.data.prepare.sources.source import Bad, Chunk, File, Piece, WholeFiles, row_of, same_columns, spread
from trainer.errors import DataError

BLOCK = 8 << 20


class Csv(WholeFiles):
    """Reads files whose first line names the columns."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        return same_columns([(file, _inferred(file)) for file in spread(files)])

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        from pyarrow import csv

        file, row = piece.file, 0
        skipped: list[int] = []
        bad: list[Bad] = []
        # As bytes, which never fail: what does not fit its type is found when it is cast, row by row.
        convert = csv.ConvertOptions(
            column_types={name: pa.large_binary() for name in schema.names}, include_columns=schema.names
        )
        read = csv.ReadOptions(use_threads=False, block_size=BLOCK)
        try:
            with open_text(file) as stream:
                for batch in csv.open_csv(stream, read, _parse_options(file, bad, skipped), convert):
                    found, bad[:] = list(bad), []
                    yield Chunk(pa.table(batch), _row_of(file, row, skipped), found)
                    row += batch.num_rows
        except KeyError as error:
            raise DataError(f"{file.url}: {error.args[0]}; choose columns=[…] or src=") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file.url} after row {row}: {str(error).splitlines()[0]}") from error
        if bad:
            yield Chunk(pa.table({name: pa.array([], pa.large_binary()) for name in schema.names}), row_of(file), bad)


def _row_of(file: File, first: int, skipped: list[int]) -> Callable[[int], str]:
    """Names rows by their number in the file, where some in between were not parsed."""

    def place(row: int) -> str:
        number = first + row + 1
        for other in skipped:
            number += other <= number
        return f"{file.url}: row {number}"

    return place


def _inferred(file: File) -> pa.Schema:
    from pyarrow import csv

    try:
        head = pa.BufferReader(head_lines(file))
        found = csv.read_csv(head, csv.ReadOptions(use_threads=False), _parse_options(file, [], [])).schema
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.url} is no CSV file: {str(error).splitlines()[0]}") from error
    return pa.schema([pa.field(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in found])


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

    tabs = ".tsv" in file.url
    return csv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True, invalid_row_handler=invalid)

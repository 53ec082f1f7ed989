"""Parquet: big files are divided by row groups; only the wanted columns are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from everstep.dataset.readers.base import (
    CHUNK_BYTES,
    Chunk,
    File,
    Piece,
    WholeFiles,
    in_parallel,
    refuse_others,
    row_of,
    spread,
)
from everstep.dataset.readers.source_files import is_url, open_file
from everstep.errors import DataError


class Parquet(WholeFiles):
    """Reads Parquet files."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        return self.together(in_parallel(lambda file: _opened(file).schema_arrow, spread(files)))

    def cut(self, file: File, size: int) -> list[Piece]:
        if file.size <= size:
            return super().cut(file, size)
        facts = _opened(file).metadata
        found: list[Piece] = []
        start = total = 0
        for group in range(facts.num_row_groups):
            columns = range(facts.num_columns)
            total += sum(facts.row_group(group).column(number).total_compressed_size for number in columns)
            if total >= size or group + 1 == facts.num_row_groups:
                found.append(Piece(file, start, group + 1, total))
                start, total = group + 1, 0
        return found

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        parquet = _opened(piece.file)
        facts = parquet.metadata
        groups = range(piece.start, facts.num_row_groups if piece.stop is None else piece.stop)
        row = sum(facts.row_group(group).num_rows for group in range(piece.start))
        refuse_others(piece.file, parquet.schema_arrow.names, schema.names, self.allowed)
        size = sum(facts.row_group(group).total_byte_size for group in groups)
        rows = sum(facts.row_group(group).num_rows for group in groups)
        many = max(1, min(rows, rows * CHUNK_BYTES // max(1, size)))
        try:
            for batch in parquet.iter_batches(many, row_groups=list(groups), columns=schema.names, use_threads=False):
                yield Chunk(pa.table(batch), row_of(piece.file, row))
                row += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{piece.file.url} cannot be read after row {row}: {str(error).splitlines()[0]}") from error


def _opened(file: File) -> Any:
    import pyarrow.parquet as pq

    try:
        # PyArrow's own access reads a local file a third faster than a Python file object.
        return pq.ParquetFile(open_file(file) if is_url(file.url) else pa.memory_map(file.url))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.url} is no Parquet file ({str(error).splitlines()[0]}); set format=") from error

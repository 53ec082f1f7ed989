"""Plain text: each line that is not empty is a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from everstep.dataset.readers.base import Chunk, File, Piece, WholeFiles, ended_early
from everstep.dataset.readers.lines import cut_lines, line_at, line_blocks
from everstep.dataset.readers.streams import CutShortError


class Text(WholeFiles):
    """Reads lines of UTF-8 into the column `text`."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        return pa.schema({"text": pa.string()})

    def cut(self, file: File, size: int) -> list[Piece]:
        return cut_lines(file, size)

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        rows = 0
        try:
            for offset, block in line_blocks(piece):
                found = _lines(piece.file, offset, block)
                rows += found.rows.num_rows
                yield found
        except CutShortError as error:
            yield ended_early(piece.file, error, rows, pa.schema({"text": pa.large_binary()}))


def _lines(file: File, offset: int, block: bytes) -> Chunk:
    """Return a block's lines without a copy of each: newlines are deleted, and offsets mark the lines."""
    plain = block.replace(b"\r\n", b"\n") if b"\r\n" in block else block
    ends = np.flatnonzero(np.frombuffer(plain, dtype=np.uint8) == ord("\n"))
    if not plain.endswith(b"\n"):
        ends = np.append(ends, len(plain))
    offsets = np.zeros(len(ends) + 1, dtype=np.int64)
    offsets[1:] = ends - np.arange(len(ends))
    filled = np.flatnonzero(np.diff(offsets))
    # Without the empty lines the others are still end to end.
    starts = np.append(offsets[filled], offsets[-1])
    values = pa.py_buffer(plain.translate(None, b"\n"))
    lines = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(filled), [None, pa.py_buffer(starts), values])
    place = line_at(file, offset, block)
    return Chunk(pa.table({"text": lines}), lambda row: place(int(filled[row])))

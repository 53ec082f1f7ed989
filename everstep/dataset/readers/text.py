"""Files of lines, cut by bytes and read by whole lines; plain text is a sample for each line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from everstep.dataset.readers.base import LONGEST_BYTES, Chunk, File, Piece, WholeFiles, ended_early
from everstep.dataset.readers.streams import CutShortError, is_cuttable, open_plain, open_text

BLOCK = 8 << 20


def cut_lines(file: File, size: int) -> list[Piece]:
    """Return pieces of `size` bytes; a file that is compressed, or not in UTF-8, is one piece."""
    if file.size <= size or not is_cuttable(file):
        return [Piece(file, size=file.size)]
    starts = range(0, file.size, size)
    return [Piece(file, start, min(start + size, file.size), min(size, file.size - start)) for start in starts]


def line_blocks(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield (offset in the file, whole lines) of the lines that begin in the piece.

    A block has some megabytes.

    Raises:
        CutShortError: the file ends too early; the whole lines before that have been yielded.
    """
    with open_plain(piece.file) if piece.start else open_text(piece.file) as stream:
        first = _to_first_line(stream, piece.start) if piece.start else stream.first
        for offset, block in _blocks(stream, first, piece.stop):
            yield offset if piece.start or offset > first else 0, block


def _to_first_line(stream: Any, start: int) -> int:
    """Seek to the first line that begins at `start` or later; return its offset."""
    position = start - 1
    stream.seek(position)
    while data := stream.read(BLOCK):
        found = data.find(b"\n")
        if found >= 0:
            stream.seek(position + found + 1)
            return position + int(found) + 1
        position += len(data)
    return position


def _blocks(stream: Any, position: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    pending = b""
    while stop is None or position < stop:
        data = stream.read(BLOCK)
        pending += data
        last = not data
        if stop is not None and position + len(pending) >= stop:
            end = pending.find(b"\n", stop - 1 - position) + 1
            if end or last:
                pending, last = pending[: end or None], True
        if last:
            if pending:
                yield position, pending
            return
        whole = pending.rfind(b"\n") + 1
        if not whole and len(pending) > LONGEST_BYTES:
            raise CutShortError(f"has a line of more than {LONGEST_BYTES} bytes, the limit, at byte {position}")
        if whole:
            yield position, pending[:whole]
            position, pending = position + whole, pending[whole:]


def line_at(file: File, offset: int, block: bytes) -> Callable[[int], str]:
    """Return a function that names line n of a block.

    Lines are named by number in the file's first block, in others by offset.
    """

    def place(line: int) -> str:
        if not offset:
            return f"{file.url}: line {line + 1}"
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
        return f"{file.url}: byte {offset + (int(ends[line - 1]) + 1 if line else 0)}"

    return place


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

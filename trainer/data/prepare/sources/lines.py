"""Files of lines: cut by bytes anywhere, read by whole lines; a line belongs to the piece in which it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from trainer.data.prepare.sources.listing import open_file
from trainer.data.prepare.sources.source import File, Piece
from trainer.errors import DataError

BLOCK = 8 << 20
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


def codec_of(file: File) -> str | None:
    """How a file is compressed, by its suffix."""
    return next((codec for suffix, codec in CODECS.items() if file.url.endswith(suffix)), None)


def open_text(file: File) -> Any:
    """The file's bytes, decompressed."""
    import pyarrow as pa

    codec = codec_of(file)
    return open_file(file) if codec is None else pa.CompressedInputStream(open_file(file), codec)


def cut_lines(file: File, size: int) -> list[Piece]:
    """Pieces of `size` bytes; a compressed file stays whole."""
    if file.size <= size or codec_of(file):
        return [Piece(file, size=file.size)]
    starts = range(0, file.size, size)
    return [Piece(file, start, min(start + size, file.size), min(size, file.size - start)) for start in starts]


def line_blocks(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, whole lines) of the lines that begin in the piece, some megabytes at a time."""
    try:
        with open_text(piece.file) as stream:
            position = _to_first_line(stream, piece.start)
            yield from _blocks(stream, position, piece.stop)
    except (OSError, EOFError) as error:
        raise DataError(f"{piece.file.url} cannot be read: {error}") from error


def _to_first_line(stream: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or later."""
    if not start:
        return 0
    position = start - 1
    stream.seek(position)
    while data := stream.read(BLOCK):
        found = data.find(b"\n")
        if found >= 0:
            stream.seek(position + found + 1)
            return position + found + 1
        position += len(data)
    return position


def _blocks(stream: IO[bytes], position: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
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
        if whole:
            yield position, pending[:whole]
            position, pending = position + whole, pending[whole:]


def line_at(file: File, offset: int, block: bytes) -> Callable[[int], str]:
    """Names line n of a block: by number in the block that begins the file, else by byte, since none has counted."""

    def place(line: int) -> str:
        if not offset:
            return f"{file.url}: line {line + 1}"
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
        return f"{file.url}: byte {offset + (int(ends[line - 1]) + 1 if line else 0)}"

    return place


def head_lines(file: File, size: int = 1 << 20) -> bytes:
    """Whole lines from the beginning of a file, some `size` bytes or one line."""
    with open_text(file) as stream:
        head: bytes = stream.read(size)
        while b"\n" not in head and (more := stream.read(size)):
            head += more
        return head if len(head) < size else head[: head.rfind(b"\n") + 1] or head

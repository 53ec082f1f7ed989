"""Streams of a file's content: decompressed, and text as UTF-8 without its byte order mark."""

from __future__ import annotations

import codecs
import lzma
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pyarrow as pa

from everstep.dataset.readers.base import File
from everstep.dataset.readers.source_files import open_file, read_file
from everstep.errors import DataError, StorageError

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
SHORT = {".tgz": "gzip", ".tbz2": "bz2", ".txz": "xz"}
MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MARK_BYTES = 4


class CutShortError(DataError):
    """The content of a file is truncated, or from some position on cannot be decompressed or decoded."""


def codec_of(file: File) -> str | None:
    """Return the name of a file's compression, by its suffix."""
    name = file.url.lower()
    return next((codec for suffix, codec in {**CODECS, **SHORT}.items() if name.endswith(suffix)), None)


def suffix_of(file: File) -> str:
    """Return the last suffix in lower case, without that of a compression."""
    stem, suffix = os.path.splitext(file.url.lower())
    return os.path.splitext(stem)[1] if suffix in CODECS else suffix


def open_plain(file: File) -> Any:
    """Open a file's bytes, decompressed; reading raises CutShortError if they end too early."""
    codec = codec_of(file)
    raw = _Reading(open_file(file), file, StorageError, "cannot be read")
    if codec is None:
        return raw
    if not file.size:
        raise CutShortError(f"{file.url} is empty, which no .{codec} file is")
    return _Reading(_decompressed(raw, codec), file, CutShortError, "is cut short or damaged", raw.close)


def _decompressed(raw: Any, codec: str) -> Any:
    return lzma.LZMAFile(raw) if codec == "xz" else pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)


def open_text(file: File) -> Any:
    """Open the text of a file as UTF-8, without a byte order mark."""
    stream = open_plain(file)
    head = b""
    while len(head) < MARK_BYTES and (more := stream.read(MARK_BYTES - len(head))):
        head += more
    mark, encoding = _marked(head)
    decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
    return _Text(stream, head[len(mark) :], file, decoder, len(mark))


def text_head(file: File, size: int) -> str:
    """Return about the first `size` bytes of a file's text, without a byte order mark."""
    if codec_of(file) is None:
        head = read_file(file, 0, size)
    else:
        with open_plain(file) as stream:
            head = stream.read(size)
    mark, encoding = _marked(head)
    return codecs.getincrementaldecoder(encoding)("replace").decode(head[len(mark) :])


def is_cuttable(file: File) -> bool:
    """True if each byte of the file is a byte of its text, so that reading may begin anywhere."""
    return codec_of(file) is None and _marked(read_file(file, 0, MARK_BYTES))[1] == "utf-8"


def _marked(head: bytes) -> tuple[bytes, str]:
    return next(((mark, encoding) for mark, encoding in MARKS if head.startswith(mark)), (b"", "utf-8"))


class _Reading:
    """Stream that raises errors as `kind`, with the file's name."""

    closed = False

    def __init__(
        self, stream: Any, file: File, kind: type[Exception], problem: str, close: Callable[[], None] | None = None
    ) -> None:
        self._stream, self._file, self._kind, self._problem, self._close = stream, file, kind, problem, close

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._stream.read(size)
        except (OSError, EOFError, lzma.LZMAError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self._kind(f"{self._file.url} {self._problem}: {reason}") from error
        return bytes(data)

    def seek(self, position: int, whence: int = 0) -> int:
        return int(self._stream.seek(position, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._stream.close()
            if self._close is not None:
                self._close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Text(_Reading):
    """Stream that converts any encoding to UTF-8, whose first bytes were read before."""

    def __init__(
        self, stream: Any, head: bytes, file: File, decoder: codecs.IncrementalDecoder | None, mark: int
    ) -> None:
        super().__init__(stream, file, CutShortError, "is no text in the encoding of its byte order mark")
        self._head, self._decoder = head, decoder
        self.first = mark
        """Offset in the file at which its text begins."""

    def read(self, size: int = -1) -> bytes:
        """Return about `size` bytes; none at the end only."""
        while True:
            raw = self._head + self._stream.read(size if size < 0 else max(0, size - len(self._head)))
            self._head = b""
            if self._decoder is None:
                return bytes(raw)
            try:
                data = self._decoder.decode(raw, final=not raw).encode()
            except UnicodeError as error:
                raise self._kind(f"{self._file.url} {self._problem}: {error.args[-1]}") from error
            if data or not raw:
                return data

"""Whole files as samples: bytes and name; and images in a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from everstep.dataset.image_decode import pillow, undecodable
from everstep.dataset.readers.base import CHUNK_BYTES, Bad, Chunk, File, Piece, WholeFiles
from everstep.dataset.readers.source_files import read_files
from everstep.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


class Files(WholeFiles):
    """Reads files whole into the columns `bytes` and `name`."""

    content: tuple[str, ...] = ("bytes",)

    def open(self, files: Sequence[File]) -> pa.Schema:
        return pa.schema({"bytes": pa.large_binary(), "name": pa.string()})

    def read(self, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[Chunk]:
        for files in _gathered(pieces):
            yield self.chunk(files, read_files(files))

    def chunk(self, files: Sequence[File], contents: list[bytes]) -> Chunk:
        """Return the rows of some files."""
        names = pa.array([file.name for file in files], pa.string())
        rows = pa.table({"bytes": pa.array(contents, pa.large_binary()), "name": names})
        return Chunk(rows, lambda row: files[row].url)


class Images(Files):
    """Reads CLASS/FILE into the columns `image`, the file's bytes, and `label`, a number for each class."""

    content: tuple[str, ...] = ("image",)

    def __init__(self) -> None:
        super().__init__()
        self.classes: list[str] = []

    def choose(self, files: Sequence[File]) -> list[File]:
        chosen = [file for file in files if file.url.lower().endswith(IMAGES)]
        if not chosen:
            raise DataError(f"src holds no image ({', '.join(IMAGES)})")
        return chosen

    def open(self, files: Sequence[File]) -> pa.Schema:
        pillow()
        self.classes = sorted({_folder(file) for file in files})
        return pa.schema({"image": pa.large_binary(), "label": pa.int64()})

    def chunk(self, files: Sequence[File], contents: list[bytes]) -> Chunk:
        reasons = [undecodable(content) for content in contents]
        good = [number for number, reason in enumerate(reasons) if not reason]
        labels = {name: number for number, name in enumerate(self.classes)}
        rows = {
            "image": pa.array([contents[n] for n in good], pa.large_binary()),
            "label": pa.array([labels[_folder(files[n])] for n in good], pa.int64()),
        }
        bad = [Bad(file.url, reason) for file, reason in zip(files, reasons, strict=True) if reason]
        return Chunk(pa.table(rows), lambda row: files[good[row]].url, bad)

    def attributes(self) -> dict[str, Any]:
        return {"classes": self.classes}


def _folder(file: File) -> str:
    return os.path.basename(os.path.dirname(file.url))


def _gathered(pieces: Sequence[Piece]) -> Iterator[list[File]]:
    """Yield groups of files with some megabytes in all."""
    pending: list[File] = []
    size = 0
    for piece in pieces:
        pending.append(piece.file)
        size += piece.file.size
        if size >= CHUNK_BYTES:
            yield pending
            pending, size = [], 0
    if pending:
        yield pending

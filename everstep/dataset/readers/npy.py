"""NumPy: .npy is one column, divided by rows; .npz has a column for each array."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any
from zipfile import ZipInfo

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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
from everstep.dataset.readers.source_files import is_url, open_file, read_file
from everstep.dataset.shard_format import table_of
from everstep.errors import DataError

LARGEST_ARCHIVE = 16 << 30
"""Bytes of all arrays of a .npz file, which are held in memory."""

HEAD = 1 << 16
VALUES = "values"


class NumPy(WholeFiles):
    """Reads arrays whose first dimension counts samples; the column of a .npy is named `values`."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        return self.together(in_parallel(lambda file: table_of(_first_rows(file)).schema, spread(files)))

    def cut(self, file: File, size: int) -> list[Piece]:
        if file.size <= size or file.url.lower().endswith(".npz"):
            return super().cut(file, size)
        shape, kind, _ = _header(file)
        step = max(1, size // _row_bytes(shape, kind))
        starts = range(0, shape[0], step)
        stops = [min(start + step, shape[0]) for start in starts]
        row = _row_bytes(shape, kind)
        return [Piece(file, start, stop, (stop - start) * row) for start, stop in zip(starts, stops, strict=True)]

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        if piece.file.url.lower().endswith(".npz"):
            arrays = _archive(piece.file)
            refuse_others(piece.file, list(arrays), schema.names, self.allowed)
            yield Chunk(table_of(arrays).select(schema.names), row_of(piece.file))
            return
        shape, kind, _ = _header(piece.file)
        stop = shape[0] if piece.stop is None else piece.stop
        step = max(1, CHUNK_BYTES // _row_bytes(shape, kind))
        for start in range(piece.start, stop, step):
            values = _rows(piece.file, start, min(start + step, stop))
            yield Chunk(table_of({VALUES: values}), row_of(piece.file, start))


def _first_rows(file: File) -> dict[str, NDArray[Any]]:
    if file.url.lower().endswith(".npz"):
        return {name: array[:1] for name, array in _archive(file).items()}
    return {VALUES: _rows(file, 0, 1)}


def _archive(file: File) -> dict[str, NDArray[Any]]:
    try:
        with open_file(file) as source, np.load(io.BytesIO(source.read()), allow_pickle=False) as archive:
            _check_size(file, archive.zip.infolist())
            arrays = {name: _native(archive[name]) for name in archive.files}
            for array in arrays.values():
                _refuse_kind(file, array.dtype)
    except (ValueError, OSError) as error:
        raise DataError(f"{file.url} cannot be read: {error}") from error
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) > 1:
        raise DataError(f"{file.url} has arrays of {', '.join(map(str, sorted(lengths)))} rows; they must be equal")
    return arrays


def _check_size(file: File, members: Sequence[ZipInfo]) -> None:
    """Raise DataError if an archive's arrays need too much memory; none is larger than it declares."""
    size = sum(member.file_size for member in members)
    if size > LARGEST_ARCHIVE:
        raise DataError(f"{file.url} unpacks to {size} bytes (limit {LARGEST_ARCHIVE}); save its arrays as .npy files")


def _header(file: File) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return (shape, type, offset of the first value) of a .npy file."""
    head = io.BytesIO(read_file(file, 0, HEAD))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(head)
    except ValueError as error:
        raise DataError(f"{file.url} is no .npy file: {error}") from error
    _refuse_kind(file, kind)
    if (fortran and len(shape) > 1) or kind.hasobject or not shape:
        raise DataError(f"{file.url} must hold numbers in C order, samples first; it has shape {shape} of {kind}")
    return shape, kind, head.tell()


def _refuse_kind(file: File, kind: np.dtype[Any]) -> None:
    if kind.kind not in "biufmM" or kind.itemsize > 8:
        raise DataError(f"{file.url} holds values of type {kind}; only numbers, truths and times train")


def _row_bytes(shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    return max(1, int(np.prod(shape[1:], dtype=np.int64)) * kind.itemsize)


def _rows(file: File, start: int, stop: int) -> NDArray[Any]:
    shape, kind, offset = _header(file)
    stop = min(stop, shape[0])
    if not is_url(file.url):
        mapped = np.memmap(file.url, kind, "r", offset, shape) if shape[0] else np.empty(shape, kind)
        return _native(np.asarray(mapped[start:stop]))
    row = _row_bytes(shape, kind)
    data = read_file(file, offset + start * row, offset + stop * row)
    return _native(np.frombuffer(data, kind).reshape(stop - start, *shape[1:]))


def _native(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array in this machine's byte order, which is Arrow's."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))

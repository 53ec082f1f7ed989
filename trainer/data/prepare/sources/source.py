"""What preparing knows of a source: files, pieces of them that are read on their own, and a reader for each format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from trainer.errors import DataError

CHUNK_BYTES = 16 << 20
"""About what a reader gives at a time, so that memory stays bounded."""


@dataclass(frozen=True)
class File:
    """One file of a source, and what tells whether it has changed since."""

    url: str
    """Path, or URL with its protocol."""
    size: int
    stamp: str
    """Time of the last change, or the store's tag of the content."""
    name: str = ""
    """Path below the folder that was given; what a sample of format files is called."""
    is_lasting: bool = True
    """Whether the stamp tells, another time, that nothing has changed."""


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read on its own: bytes, rows or row groups from `start` to before `stop`."""

    file: File
    start: int = 0
    stop: int | None = None
    """None is the end."""
    size: int = 0
    """Bytes of the source, for balance and progress."""


@dataclass(frozen=True)
class Unit:
    """What one process does at a time, and what a restart does not do again."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


class Bad(NamedTuple):
    """A record that was left out."""

    place: str
    reason: str


class Chunk(NamedTuple):
    """Some rows as they were read, and where each came from."""

    rows: pa.Table
    place: Callable[[int], str]
    bad: Sequence[Bad] = ()
    """Records between these rows that could not be read at all."""


class Reader(Protocol):
    """One format. Travels to the processes that read, so it holds plain values only, unless it `stays`."""

    stays: bool
    """Reads from this process's memory: threads do the work."""
    content: tuple[str, ...]
    """Columns that are a sample's content; () for all. Names of files are not."""

    def choose(self, files: Sequence[File]) -> list[File]:
        """Those of the files that hold samples."""
        ...

    def open(self, files: Sequence[File]) -> pa.Schema:
        """Look at the files, once, in the process that plans; the columns that they have."""
        ...

    def cut(self, file: File, size: int) -> list[Piece]:
        """Pieces of some `size` bytes each, the same on every machine."""
        ...

    def read(self, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[Chunk]:
        """Tables with at least the columns of `schema`, in the order of the source; `clean` gives them its types."""
        ...

    def attributes(self) -> dict[str, Any]:
        """What the index should tell of the source beside the columns."""
        ...


class WholeFiles:
    """What most readers share: all files count, one is read in one piece, all columns are content."""

    stays = False
    content: tuple[str, ...] = ()

    def choose(self, files: Sequence[File]) -> list[File]:
        return list(files)

    def cut(self, file: File, size: int) -> list[Piece]:
        return [Piece(file, size=file.size)]

    def read(self, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[Chunk]:
        for piece in pieces:
            yield from self.read_one(piece, schema)

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        """The rows of one piece."""
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        return {}


def row_of(file: File, first: int = 0) -> Callable[[int], str]:
    """Names rows of a file, counted from 1; `first` is how many come before."""
    return lambda row: f"{file.url}: row {first + row + 1}"


def spread(files: Sequence[File], most: int = 16) -> list[File]:
    """Up to `most` of the files, evenly over the list: what the columns are told from."""
    step = max(1, len(files) / most)
    return [files[int(number * step)] for number in range(min(most, len(files)))]


def same_columns(schemas: Sequence[tuple[File, pa.Schema]]) -> pa.Schema:
    """One schema for all files; numbers widen, columns that are not in all are refused."""
    first_file, first = schemas[0]
    for file, schema in schemas:
        differ = sorted(set(schema.names) ^ set(first.names))
        if differ:
            raise DataError(
                f"{file.url} and {first_file.url} differ in columns {', '.join(differ)}; choose columns=[…] or src="
            )
    try:
        return pa.unify_schemas([schema for _, schema in schemas], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"the files' columns are not of the same types: {str(error).splitlines()[0]}") from error


MANY_FILES = 10_000


def units(pieces: Iterable[Piece], size: int) -> list[Unit]:
    """Pieces in order, gathered until they reach `size` bytes."""
    found: list[Unit] = []
    pending: list[Piece] = []
    total = 0
    for piece in pieces:
        pending.append(piece)
        total += piece.size
        if total >= size or len(pending) >= MANY_FILES:
            found.append(Unit(len(found), tuple(pending)))
            pending, total = [], 0
    return [*found, Unit(len(found), tuple(pending))] if pending else found

"""Sources of a preparation: files, their pieces that can be read alone, and a reader per format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from everstep.errors import DataError

CHUNK_BYTES = 16 << 20
"""Approximate size of a chunk, which bounds a reader's memory."""
LONGEST_BYTES = 1 << 30
"""Largest line, JSON value, file of an archive, or sample, whatever a few bytes decompress to."""
LOOK_BYTES = 1 << 30
"""Largest source that is read as a whole to find its columns.

Of a larger one as many bytes are read, spread over it.
"""


@dataclass(frozen=True)
class File:
    """One file of a source, with a stamp that changes when the file does."""

    url: str
    """Path, or URL with its protocol."""
    size: int
    stamp: str
    """Time of the last change, or the store's tag of the content."""
    name: str = ""
    """Path below the given folder; the name of a sample of format=files."""
    is_lasting: bool = True
    """True if an equal stamp at another time means that nothing has changed."""


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read alone: bytes, rows or row groups from `start` to before `stop`."""

    file: File
    start: int = 0
    stop: int | None = None
    """None is the end."""
    size: int = 0
    """Bytes of the source, for balance and progress."""


@dataclass(frozen=True)
class Unit:
    """Unit of work of one process; a restart does not repeat a finished one."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


class Bad(NamedTuple):
    """Record that was left out."""

    place: str
    reason: str


class Chunk(NamedTuple):
    """Some rows as they were read, and a function that returns the location of each."""

    rows: pa.Table
    place: Callable[[int], str]
    bad: Sequence[Bad] = ()
    """Records between these rows that could not be read at all."""


class Reader(Protocol):
    """Reader of one format.

    It is pickled for the processes that read, so it holds plain values, unless it `stays`.
    """

    stays: bool
    """True if it reads from this process's memory, so that threads do the work."""
    content: tuple[str, ...]
    """Columns that are a sample's content; () for all. Names of files are not."""
    problems: dict[str, str]
    """Reason for each column that cannot be read from all files."""
    chosen: bool
    """True if columns were chosen; else a column that `open` has not seen, in a large source, is an error."""

    def choose(self, files: Sequence[File]) -> list[File]:
        """Return those of the files that hold samples."""
        ...

    def open(self, files: Sequence[File]) -> pa.Schema:
        """Inspect the files, once, in the process that plans; return their columns."""
        ...

    def cut(self, file: File, size: int) -> list[Piece]:
        """Return pieces of about `size` bytes each, the same on every machine."""
        ...

    def read(self, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[Chunk]:
        """Yield tables with at least the columns of `schema`, in the order of the source; `clean` casts them."""
        ...

    def attributes(self) -> dict[str, Any]:
        """Return facts of the source for the index, beside the columns."""
        ...


class WholeFiles:
    """Base of most readers: all files are read, each in one piece, and all columns are content."""

    stays = False
    content: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.known: list[str] = []
        """Columns of the files that were inspected."""
        self.problems: dict[str, str] = {}
        self.chosen = False

    def choose(self, files: Sequence[File]) -> list[File]:
        return list(files)

    def cut(self, file: File, size: int) -> list[Piece]:
        return [Piece(file, size=file.size)]

    def read(self, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[Chunk]:
        for piece in pieces:
            yield from self.read_one(piece, schema)

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        """Yield the rows of one piece."""
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        return {}

    @property
    def allowed(self) -> Sequence[str]:
        """Columns that a file may have; () for any."""
        return () if self.chosen else self.known

    def together(self, schemas: Sequence[tuple[File, pa.Schema]]) -> pa.Schema:
        """Return the columns of all files, with types that hold the values of each."""
        self.known, self.problems = all_columns([(file, schema.names) for file, schema in schemas])
        return same_types(schemas)


def row_of(file: File, first: int = 0) -> Callable[[int], str]:
    """Return a function that names rows of a file, counted from 1, after `first` others."""
    return lambda row: f"{file.url}: row {first + row + 1}"


def ended_early(file: File, error: Exception, rows: int, schema: pa.Schema) -> Chunk:
    """Return a chunk of no rows and one bad record, for the rest of a truncated or damaged file."""
    reason = str(error).removeprefix(file.url).strip()
    bad = Bad(f"{file.url} after row {rows}", f"{reason}; what follows is lost")
    return Chunk(schema.empty_table(), row_of(file), [bad])


def in_parallel(look: Callable[[File], pa.Schema], files: Sequence[File]) -> list[tuple[File, pa.Schema]]:
    """Return each file with its schema; files in a store are read in parallel to hide round trips."""
    with ThreadPoolExecutor(16 if "://" in files[0].url else 1) as pool:
        return list(zip(files, pool.map(look, files), strict=True))


def spread(files: Sequence[File], most: int = 1024) -> list[File]:
    """Return up to `most` of the files, evenly over the list."""
    step = max(1, len(files) / most)
    return [files[int(number * step)] for number in range(min(most, len(files)))]


def refuse_twice(file: File, names: Sequence[str]) -> None:
    """Raise DataError if two columns have one name."""
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{file.url} has the column {name!r} twice; rename one of them")


def all_columns(found: Sequence[tuple[File, Sequence[str]]]) -> tuple[list[str], dict[str, str]]:
    """Return the columns of all files, and the problem of each that some file lacks."""
    first_file, first = found[0]
    together = list(dict.fromkeys(name for _, names in found for name in names))
    problems: dict[str, str] = {}
    for file, names in found:
        refuse_twice(file, names)
        differ = sorted(set(names) ^ set(first))
        for name in differ:
            problems.setdefault(
                name,
                f"{file.url} and {first_file.url} differ in columns {', '.join(differ)}; choose columns=[…] or src=",
            )
    return together, problems


def refuse_others(file: File, names: Sequence[str], wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raise DataError for a file without a wanted column, or with one that is not in `known`.

    An empty `known` allows any column.
    """
    refuse_twice(file, names)
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None:
        raise DataError(f"{file.url} has no column {missing!r}; choose columns=[…] or src=")
    late = next((name for name in names if name not in known), None) if known else None
    if late is not None:
        raise DataError(f"{file.url} has a column {late!r}, which comes too late; choose columns=[…] or src=")


def same_types(schemas: Sequence[tuple[File, pa.Schema]]) -> pa.Schema:
    """Return one schema for all files; numbers widen."""
    try:
        return pa.unify_schemas([schema for _, schema in schemas], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"the files' columns are not of the same types: {str(error).splitlines()[0]}") from error


def looked_at(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces to find types in: all, or of a large source LOOK_BYTES spread over its length."""
    total = sum(piece.size for piece in pieces)
    if total <= LOOK_BYTES:
        return list(pieces)
    many = max(1, len(pieces) * LOOK_BYTES // total)
    return [pieces[number * len(pieces) // many] for number in range(many)]


MANY_FILES = 10_000


def units(pieces: Iterable[Piece], size: int) -> list[Unit]:
    """Return units of pieces in order, of `size` bytes or a little more."""
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

"""What preparing knows of a source: files, pieces of them that are read on their own, and a reader for each format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from trainer.errors import DataError

CHUNK_BYTES = 16 << 20
"""About what a reader gives at a time, so that memory stays bounded."""
LOOK_BYTES = 1 << 30
"""A source of up to so many bytes is read as a whole to tell its columns; of a larger one as many, spread over it."""


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
    problems: dict[str, str]
    """For each column that cannot be read from all files, why."""
    chosen: bool
    """Columns were chosen; else one that nobody has seen, in a source too large to look at as a whole, is told."""

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

    def __init__(self) -> None:
        self.known: list[str] = []
        """The columns that the files have, as far as they were looked at."""
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
        """The rows of one piece."""
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        return {}

    @property
    def allowed(self) -> Sequence[str]:
        """The columns that a file may have; () for any."""
        return () if self.chosen else self.known

    def together(self, schemas: Sequence[tuple[File, pa.Schema]]) -> pa.Schema:
        """The columns of all files, with types that hold the values of each."""
        self.known, self.problems = all_columns([(file, schema.names) for file, schema in schemas])
        return same_types(schemas)


def row_of(file: File, first: int = 0) -> Callable[[int], str]:
    """Names rows of a file, counted from 1; `first` is how many come before."""
    return lambda row: f"{file.url}: row {first + row + 1}"


def ended_early(file: File, error: Exception, rows: int, schema: pa.Schema) -> Chunk:
    """No rows, but the bad record that stands for what is lost of a file that is cut short or damaged."""
    reason = str(error).removeprefix(file.url).strip()
    bad = Bad(f"{file.url} after row {rows}", f"{reason}; what follows is lost")
    return Chunk(schema.empty_table(), row_of(file), [bad])


def in_parallel(look: Callable[[File], pa.Schema], files: Sequence[File]) -> list[tuple[File, pa.Schema]]:
    """Each file with its schema; in a store several are looked at together, since each costs a round trip."""
    with ThreadPoolExecutor(16 if "://" in files[0].url else 1) as pool:
        return list(zip(files, pool.map(look, files), strict=True))


def spread(files: Sequence[File], most: int = 1024) -> list[File]:
    """Up to `most` of the files, evenly over the list: what the columns are told from."""
    step = max(1, len(files) / most)
    return [files[int(number * step)] for number in range(min(most, len(files)))]


def refuse_twice(file: File, names: Sequence[str]) -> None:
    """DataError when two columns have one name."""
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{file.url} has the column {name!r} twice; rename one of them")


def all_columns(found: Sequence[tuple[File, Sequence[str]]]) -> tuple[list[str], dict[str, str]]:
    """The columns of all files, and for each that not all of them have what is wrong with it."""
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
    """DataError for a file without a column that is wanted, or with one that is not known; with none known, all are."""
    refuse_twice(file, names)
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None:
        raise DataError(f"{file.url} has no column {missing!r}; choose columns=[…] or src=")
    late = next((name for name in names if name not in known), None) if known else None
    if late is not None:
        raise DataError(f"{file.url} has a column {late!r}, which comes too late; choose columns=[…] or src=")


def same_types(schemas: Sequence[tuple[File, pa.Schema]]) -> pa.Schema:
    """One schema for all files; numbers widen."""
    try:
        return pa.unify_schemas([schema for _, schema in schemas], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"the files' columns are not of the same types: {str(error).splitlines()[0]}") from error


def looked_at(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces that types are told from: all, or of a source that is too large some from its whole length."""
    total = sum(piece.size for piece in pieces)
    if total <= LOOK_BYTES:
        return list(pieces)
    many = max(1, len(pieces) * LOOK_BYTES // total)
    return [pieces[number * len(pieces) // many] for number in range(many)]


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

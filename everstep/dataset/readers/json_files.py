"""JSON files: an object on each line, or one array of objects."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from everstep.dataset.readers.base import (
    CHUNK_BYTES,
    LOOK_BYTES,
    Bad,
    Chunk,
    File,
    Piece,
    WholeFiles,
    ended_early,
    looked_at,
)
from everstep.dataset.readers.json_array import elements, is_array
from everstep.dataset.readers.json_values import Guess, Rows, Seen, Wanted, read_lines, rows_of, see, see_lines
from everstep.dataset.readers.streams import CutShortError
from everstep.dataset.readers.text import BLOCK, cut_lines, line_at, line_blocks
from everstep.dataset.readers.type_inference import Values, in_all
from everstep.errors import DataError


class JsonLines(WholeFiles):
    """Reads JSON objects; keys other than the chosen columns are left out."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        pieces = looked_at([piece for file in files for piece in self.cut(file, BLOCK)])
        by_file: dict[str, Seen] = {}
        guess = Guess()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for piece, found in zip(pieces, pool.map(lambda piece: _seen(piece, guess), pieces), strict=True):
                for name, values in found.items():
                    by_file.setdefault(piece.file.url, {}).setdefault(name, Values()).add(values)
        if not by_file:
            collections.deque(_read(Piece(files[0]), Wanted(pa.schema([]), frozenset())), maxlen=0)  # raises the reason
            raise DataError(f"{files[0].url} begins without one JSON object a line, and is no array of objects")
        columns = in_all(by_file.items(), Values)
        self.known = list(columns)
        return pa.schema([pa.field(name, values.type) for name, values in columns.items()])

    def cut(self, file: File, size: int) -> list[Piece]:
        if file.size > size and is_array(file):
            return super().cut(file, size)
        return cut_lines(file, size)

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        wanted = Wanted(schema, frozenset(self.allowed))
        rows = 0
        try:
            for found, place in _read(piece, wanted):
                rows += found.table.num_rows
                yield _chunk(found, place)
        except CutShortError as error:
            yield ended_early(piece.file, error, rows, schema)


def _read(piece: Piece, wanted: Wanted) -> Iterator[tuple[Rows, Callable[[int], str]]]:
    if not piece.start and is_array(piece.file):
        yield from _elements(piece.file, wanted)
        return
    for offset, block in line_blocks(piece):
        yield read_lines(block, wanted), line_at(piece.file, offset, block)


def _elements(file: File, wanted: Wanted) -> Iterator[tuple[Rows, Callable[[int], str]]]:
    def place(number: int) -> str:
        return f"{file.url}: element {number + 1}"

    pending, size, broken = [], 0, None
    try:
        for number, value, length in elements(file):
            pending.append((number, value))
            size += length
            if size >= CHUNK_BYTES:
                yield rows_of(pending, wanted), place
                pending, size = [], 0
    except CutShortError as error:
        broken = error
    yield rows_of(pending, wanted), place
    if broken is not None:
        raise broken


def _chunk(found: Rows, place: Callable[[int], str]) -> Chunk:
    bad = [Bad(place(number), found.bad[number]) for number in sorted(found.bad)]
    return Chunk(found.table, lambda row: place(int(found.numbers[row])), bad)


def _seen(piece: Piece, guess: Guess) -> Seen:
    found: Seen = {}
    size = 0
    try:
        for length in _see(piece, found, guess):
            size += length
            if size > LOOK_BYTES:
                break
    except CutShortError:
        pass  # `read_one` reports it
    return found


def _see(piece: Piece, found: Seen, guess: Guess) -> Iterator[int]:
    """Count the values of a piece; yield the bytes that are done."""
    if not piece.start and is_array(piece.file):
        for _, value, size in elements(piece.file):
            see(value, found)
            yield size
    else:
        for _, block in line_blocks(piece):
            see_lines(block, found, guess)
            yield len(block)

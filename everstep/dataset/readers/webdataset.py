"""WebDataset: tar files in which the files of a sample are consecutive and share their key.

The key is the name up to the first dot.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa

from everstep.dataset.readers.base import (
    CHUNK_BYTES,
    LONGEST_BYTES,
    LOOK_BYTES,
    Bad,
    Chunk,
    File,
    Piece,
    WholeFiles,
    ended_early,
    looked_at,
)
from everstep.dataset.readers.streams import CutShortError
from everstep.dataset.readers.tar import Entry, entries
from everstep.dataset.readers.type_inference import HIGHEST, LOWEST
from everstep.errors import DataError

Sample = dict[str, bytes]
KEY = "key"
CLASS = "cls"
"""Extension of the label, a whole number."""
SAMPLE_BYTES = 1 << 10
"""About what a sample takes beside its content, so that a chunk of empty ones is bounded too."""
NUMBER = re.compile(rb"\s*[+-]?[0-9]{1,19}\s*")


class WebDataset(WholeFiles):
    """Reads tar files into `key` and one column for each extension: `cls` as a number, others as bytes."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        found: dict[str, None] = {}
        for piece in looked_at([Piece(file, size=file.size) for file in files]):
            found |= _extensions(piece.file)
        if not found:
            collections.deque(entries(files[0], contents=False), maxlen=0)  # raises the reason
            raise DataError(f"{files[0].url} holds no sample: files named KEY.EXTENSION")
        self.known = [KEY, *found]
        self.content = tuple(found)
        kinds = {name: pa.int64() if name == CLASS else pa.large_binary() for name in found}
        return pa.schema({KEY: pa.string(), **kinds})

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        keys: list[str] = []
        found: list[Sample] = []
        bad: list[Bad] = []
        size = rows = 0
        try:
            for key, sample in _samples(piece.file, bad):
                reason = _unfit(sample, schema, self.allowed)
                size += SAMPLE_BYTES
                if reason:
                    bad.append(Bad(f"{piece.file.url}: {key}", reason))
                else:
                    keys.append(key)
                    found.append(sample)
                    rows += 1
                    size += sum(map(len, sample.values()))
                if size >= CHUNK_BYTES:
                    yield _chunk(piece.file, keys, found, bad, schema)
                    keys, found, bad, size = [], [], [], 0
        except CutShortError as error:
            bad += ended_early(piece.file, error, rows, schema).bad
        yield _chunk(piece.file, keys, found, bad, schema)


def _unfit(sample: Sample, schema: pa.Schema, known: Sequence[str]) -> str:
    missing = next((name for name in schema.names if name != KEY and name not in sample), None)
    if missing is not None:
        return f"has no .{missing}"
    late = next((name for name in sample if name not in known), None) if known else None
    if late is not None:
        return f"has .{late}, which comes too late to be seen; choose columns="
    if CLASS in schema.names and not _is_number(sample[CLASS]):
        return f"column {CLASS!r}: does not fit int64"
    return ""


def _is_number(content: bytes) -> bool:
    return NUMBER.fullmatch(content) is not None and LOWEST <= int(content) <= HIGHEST


def _chunk(file: File, keys: list[str], found: list[Sample], bad: list[Bad], schema: pa.Schema) -> Chunk:
    columns = {}
    for name in schema.names:
        if name == KEY:
            columns[name] = pa.array([key.encode(errors="surrogateescape") for key in keys], pa.large_binary())
        elif name == CLASS:
            columns[name] = pa.array([int(sample[name]) for sample in found], pa.int64())
        else:
            columns[name] = pa.array([sample[name] for sample in found], pa.large_binary())
    return Chunk(pa.table(columns), lambda row: f"{file.url}: {keys[row]}", bad)


def _extensions(file: File) -> dict[str, None]:
    """Return the extensions of an archive, in order."""
    found: dict[str, None] = {}
    size = 0
    try:
        for entry in entries(file, contents=False):
            if isinstance(entry, Entry):
                found.setdefault(entry.extension)
                size += entry.size
            if size > LOOK_BYTES:
                break
    except CutShortError:
        pass  # `read_one` reports it
    return found


def _samples(file: File, bad: list[Bad]) -> Iterator[tuple[str, Sample]]:
    """Yield each sample's key and files; add other entries to `bad`."""
    key, sample, unfit = "", Sample(), ""
    broken, size = None, 0
    try:
        for entry in entries(file):
            if isinstance(entry, Bad):
                bad.append(entry)
                continue
            if entry.key != key:
                if sample and not unfit:
                    yield key, sample
                key, sample, unfit, size = entry.key, Sample(), "", 0
            size += entry.size
            if not unfit and (unfit := _too_much(entry, sample, size)):
                bad.append(Bad(f"{file.url}: {key}", unfit))
            sample[entry.extension] = b"" if unfit else entry.content
    except CutShortError as error:
        broken = error
    if sample and not unfit:
        yield key, sample
    if broken is not None:
        raise broken


def _too_much(entry: Entry, sample: Sample, size: int) -> str:
    """Return the reason why a sample cannot take this file; empty if it can."""
    if entry.extension in sample:
        return f"has .{entry.extension} twice"
    return f"is larger than {LONGEST_BYTES} bytes, the limit" if size > LONGEST_BYTES else ""

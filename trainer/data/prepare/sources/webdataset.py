"""WebDataset: tar files in which the files of a sample follow each other and share their name up to the first dot."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence

import pyarrow as pa

from trainer.data.prepare.sources.listing import open_file
from trainer.data.prepare.sources.source import CHUNK_BYTES, Bad, Chunk, File, Piece, WholeFiles
from trainer.errors import DataError

Sample = dict[str, bytes]
KEY = "key"
CLASS = "cls"
"""The extension of a number: the label."""


class WebDataset(WholeFiles):
    """Reads tar files into `key` and one column for each extension: `cls` as a number, others as bytes."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        first = next(_samples(files[0]), None)
        if first is None:
            raise DataError(f"{files[0].url} holds no sample: files named KEY.EXTENSION")
        self.content = tuple(first[1])
        kinds = {name: pa.int64() if name == CLASS else pa.large_binary() for name in first[1]}
        return pa.schema({KEY: pa.string(), **kinds})

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        keys: list[str] = []
        found: list[Sample] = []
        bad: list[Bad] = []
        size = 0
        for key, sample in _samples(piece.file):
            missing = [name for name in schema.names if name != KEY and name not in sample]
            if missing:
                bad.append(Bad(f"{piece.file.url}: {key}", f"has no .{missing[0]}"))
                continue
            keys.append(key)
            found.append(sample)
            size += sum(map(len, sample.values()))
            if size >= CHUNK_BYTES:
                yield _chunk(piece.file, keys, found, bad, schema)
                keys, found, bad, size = [], [], [], 0
        yield _chunk(piece.file, keys, found, bad, schema)


def _chunk(file: File, keys: list[str], found: list[Sample], bad: list[Bad], schema: pa.Schema) -> Chunk:
    columns = {
        name: pa.array(keys) if name == KEY else pa.array([sample[name] for sample in found], pa.large_binary())
        for name in schema.names
    }
    return Chunk(pa.table(columns), lambda row: f"{file.url}: {keys[row]}", bad)


def _samples(file: File) -> Iterator[tuple[str, Sample]]:
    key, sample = "", Sample()
    try:
        with open_file(file) as source, tarfile.open(fileobj=source, mode="r|*") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                content = tar.extractfile(member) if member.isfile() and dot and stem else None
                if content is None:
                    continue
                here = f"{folder}/{stem}" if folder else stem
                if here != key and sample:
                    yield key, sample
                    sample = {}
                key = here
                sample[extension.lower()] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{file.url} is no whole tar file: {error}") from error
    if sample:
        yield key, sample

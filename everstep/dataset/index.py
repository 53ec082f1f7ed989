"""index.json: the index of a dataset folder. It is written last: a folder without one is no dataset.

{"format": 2, "digest": …, "columns": {"tokens": {"type": "uint8", "shape": [129]}},
 "shards": [{"file", "rows", "bytes", "parts": [digest of each 4 MiB]}, …], "attributes": {…how it was prepared…}}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from blake3 import blake3

from everstep.checked_json import mapping, parse, record, sequence, shown, text, whole
from everstep.dataset.tags import tags_of
from everstep.errors import DataError
from everstep.storage import join_url, open_storage
from everstep.storage.names import is_plain, leads_out

INDEX = "index.json"
TRAIN, VALIDATION = "train", "validation"
"""Folders of the datasets in a folder that holds both."""
FORMAT = 2
PART_BYTES = 4 << 20
"""Size of a part, which is downloaded and verified as a whole.

A shard's digests are those of its parts.
"""
TEXT, BYTES = "str", "bytes"
"""Types of columns whose samples are UTF-8 text or any bytes."""
NUMBERS = {
    **{f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": bits for bits in (16, 32, 64)},
    "bool": 1,
}
"""Types of numbers by NumPy's name, and bits of each in a shard."""
MOST_COLUMNS, MOST_SHARDS, MOST_DIMENSIONS = 1 << 16, 1 << 24, 32
MOST_ROWS, MOST_BYTES = 1 << 56, 1 << 48
"""Samples of a dataset; bytes of a shard or of one sample, so that addresses fit into 63 bits."""
_DIGEST = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Shard:
    """One Arrow IPC file of a dataset."""

    file: str
    """Name in the dataset folder."""
    rows: int
    bytes: int
    """Size of the file."""
    parts: tuple[str, ...]
    """`part_digest` of each PART_BYTES of the file; the last part may be smaller."""

    @cached_property
    def digest(self) -> str:
        """Hex digest of the file, made of those of its parts."""
        return part_digest("".join(self.parts).encode())


def part_digest(data: bytes | bytearray | memoryview) -> str:
    """Return a hex BLAKE3 of 128 bits (https://github.com/BLAKE3-team/BLAKE3-specs).

    It digests some 5 GB/s on one core.
    """
    return blake3(data).hexdigest(length=16)


@dataclass(frozen=True)
class Column:
    """Type and shape of a sample in one column."""

    type: str
    """NumPy name of the numbers (uint8, float32 …), or `str` or `bytes`."""
    shape: tuple[int | None, ...] = ()
    """Shape of one sample; () for a single number, (None,) if the length differs from sample to sample."""

    @property
    def ragged(self) -> bool:
        """True if samples differ in length."""
        return self.shape == (None,)


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one dataset, in order; sample ids are consecutive over all of them."""

    columns: Mapping[str, Column]
    shards: tuple[Shard, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Description of the preparation; plain JSON values."""

    @property
    def rows(self) -> int:
        """Samples in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """Hex digest of the dataset: of the columns and of every shard's rows and digest, in order."""
        content = [
            sorted((name, column.type, list(column.shape)) for name, column in self.columns.items()),
            [(shard.rows, shard.digest) for shard in self.shards],
        ]
        return blake3(json.dumps(content).encode()).hexdigest()

    def write(self, folder: str) -> None:
        """Write `folder`/index.json (a path or a URL) as a whole, when all shards are stored there."""
        document = {
            "format": FORMAT,
            "digest": self.digest,
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "shards": [asdict(shard) for shard in self.shards],
            "attributes": dict(self.attributes),
        }
        open_storage(folder).write(INDEX, json.dumps(document, indent=1).encode())

    @cached_property
    def tags(self) -> dict[str, str]:
        """Tags of the dataset, such as its licence; they are no part of its digest."""
        return tags_of(self.attributes)

    @property
    def is_compressed(self) -> bool:
        return bool(self.attributes.get("compression", "none") != "none")

    @classmethod
    def read(cls, folder: str) -> ShardIndex:
        """Read the index of a folder, or of any fsspec URL.

        Raises:
            DataError: there is none, or it is damaged.
        """
        try:
            storage = open_storage(folder)
            if leads_out(storage, "", INDEX):
                raise ValueError("it is a link out of its folder")
            document = mapping(parse(storage.read(INDEX)), "it")
            if (found := document.get("format")) != FORMAT:
                raise DataError(
                    f"{join_url(folder, INDEX)} has format {shown(found)}; this version reads {FORMAT}: "
                    "prepare the dataset again"
                )
            return _parse(document)
        except FileNotFoundError:
            raise DataError(
                f"{folder} is no dataset: it has no {INDEX}; prepare it with `everstep data prepare`"
            ) from None
        except ValueError as error:
            raise DataError(f"{join_url(folder, INDEX)} is damaged: {error}; prepare the dataset again") from error


def folders(path: str) -> list[str]:
    """Return the dataset in `path`, or those of its splits, the training data first."""
    storage = open_storage(path)
    if storage.exists(INDEX):
        return [path]
    folders = [join_url(path, name) for name in (TRAIN, VALIDATION) if storage.exists(f"{name}/{INDEX}")]
    if not folders or not folders[0].endswith(TRAIN):
        raise DataError(f"{path} is no dataset: it has no {INDEX}; prepare it with `everstep data prepare`")
    return folders


def _parse(document: Mapping[str, Any]) -> ShardIndex:
    """Return the index that a document describes; ValueError with the place of a wrong field."""
    attributes = mapping(document.get("attributes"), "attributes")
    columns = {
        text(name, "the name of a column"): _column(f"columns.{shown(name)}", column)
        for name, column in mapping(document.get("columns"), "columns", MOST_COLUMNS).items()
    }
    tags_of(attributes)
    packed = attributes.get("compression", "none") != "none"
    shards = [
        _shard(f"shards[{number}]", shard, {} if packed else columns)
        for number, shard in enumerate(sequence(document.get("shards"), "shards", MOST_SHARDS))
    ]
    index = ShardIndex(columns, tuple(shards), attributes)
    whole(index.rows, "the number of samples", 0, MOST_ROWS)
    if document.get("digest") != index.digest:
        raise ValueError("its digest does not match its own list of shards")
    return index


def _column(place: str, described: object) -> Column:
    kind, shape = record(described, place, "type", "shape")
    sizes = sequence(shape, f"{place}.shape", MOST_DIMENSIONS)
    if kind not in (TEXT, BYTES, *NUMBERS):
        raise ValueError(f"{place}.type is {shown(kind)}, not a type of numbers, {TEXT} or {BYTES}")
    if sizes == [None]:
        return Column(kind, (None,))
    if kind in (TEXT, BYTES):
        raise ValueError(f"{place}.shape is not [null], as samples of {kind} need")
    column = Column(kind, tuple(whole(size, f"{place}.shape", 0, MOST_BYTES) for size in sizes))
    whole(_bits(column), f"{place}, bits of a sample,", 0, MOST_BYTES)
    return column


def _shard(place: str, described: object, columns: Mapping[str, Column]) -> Shard:
    """Return a shard; its file cannot be smaller than its rows in `columns`, unless it is compressed."""
    file, rows, size, parts = record(described, place, "file", "rows", "bytes", "parts")
    if not is_plain(file):
        raise ValueError(f"{place}.file is {shown(file)}, not the name of a file in the dataset's folder")
    whole(size, f"{place}.bytes", 1, MOST_BYTES)
    least = sum(64 if column.ragged else _bits(column) for column in columns.values())
    whole(rows, f"{place}.rows", 0, size * 8 // least if least else MOST_ROWS)
    count = -(-size // PART_BYTES)
    if len(sequence(parts, f"{place}.parts")) != count:
        raise ValueError(f"{place}.parts has {len(parts)} digests where {size} bytes have {count} parts")
    if wrong := [part for part in parts if not isinstance(part, str) or not _DIGEST.fullmatch(part)]:
        raise ValueError(f"{place}.parts has {shown(wrong[0])}, which is no digest")
    return Shard(file, rows, size, tuple(parts))


def _bits(column: Column) -> int:
    """Return the bits of one sample of a column whose samples all have one shape."""
    return math.prod(size or 0 for size in column.shape) * NUMBERS[column.type]

"""index.json: the index of a dataset folder. It is written last: a folder without one is no dataset.

{"format": 2, "digest": …, "columns": {"tokens": {"type": "uint8", "shape": [129]}},
 "shards": [{"file", "rows", "bytes", "parts": [digest of each 4 MiB]}, …], "attributes": {…how it was prepared…}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from blake3 import blake3

from everstep.errors import DataError
from everstep.storage import join_url, open_storage

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

    @classmethod
    def read(cls, folder: str) -> ShardIndex:
        """Read the index of a folder, or of any fsspec URL.

        Raises:
            DataError: there is none, or it is damaged.
        """
        try:
            document = json.loads(open_storage(folder).read(INDEX))
            if document.get("format") != FORMAT:
                raise DataError(
                    f"{join_url(folder, INDEX)} has format {document.get('format')}; this version reads {FORMAT}: "
                    "prepare the dataset again"
                )
            index = cls(
                columns={
                    name: Column(column["type"], tuple(column["shape"])) for name, column in document["columns"].items()
                },
                shards=tuple(Shard(**{**shard, "parts": tuple(shard["parts"])}) for shard in document["shards"]),
                attributes=document["attributes"],
            )
        except FileNotFoundError:
            raise DataError(
                f"{folder} is no dataset: it has no {INDEX}; prepare it with `everstep data prepare`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{join_url(folder, INDEX)} is damaged ({error!r}); prepare the dataset again") from error
        if document.get("digest") != index.digest:
            raise DataError(f"{join_url(folder, INDEX)} is damaged: its digest does not match its own list of shards")
        return index

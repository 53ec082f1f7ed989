"""index.json: what a dataset folder holds. Written last, so a folder without one is not a dataset.

{"format": 1, "digest": …, "columns": {"tokens": {"type": "uint8", "shape": [129]}},
 "shards": [{"file", "rows", "bytes", "sha256"}, …], "attributes": {…how it was prepared…}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.errors import DataError

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One Arrow IPC file of a dataset."""

    file: str
    """Name in the dataset folder."""
    rows: int
    bytes: int
    """Size of the file."""
    sha256: str
    """Hex digest of the file, the one that `sha256sum` prints."""


@dataclass(frozen=True)
class Column:
    """A column of fixed-size samples."""

    type: str
    """NumPy name of the numbers: uint8, float32 …"""
    shape: tuple[int, ...] = ()
    """Of one sample; () for a single number."""


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one dataset, in order: sample ids count through them."""

    columns: Mapping[str, Column]
    shards: tuple[Shard, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """How the dataset was prepared; plain JSON values."""

    @property
    def rows(self) -> int:
        """Samples in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Hex digest of the whole: of the columns and of every shard's rows and digest, in order."""
        content = [
            sorted((name, column.type, list(column.shape)) for name, column in self.columns.items()),
            [(shard.rows, shard.sha256) for shard in self.shards],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, folder: str) -> None:
        """Write `folder`/index.json by atomic replace, when all shards lie there."""
        document = {
            "format": FORMAT,
            "digest": self.digest,
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "shards": [asdict(shard) for shard in self.shards],
            "attributes": dict(self.attributes),
        }
        path = os.path.join(folder, INDEX)
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @classmethod
    def read(cls, folder: str) -> ShardIndex:
        """The index of a folder, or of any fsspec URL; DataError when there is none or it is damaged."""
        try:
            document = json.loads(_text(folder))
            index = cls(
                columns={
                    name: Column(column["type"], tuple(column["shape"])) for name, column in document["columns"].items()
                },
                shards=tuple(Shard(**shard) for shard in document["shards"]),
                attributes=document["attributes"],
            )
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder} is no dataset: it has no {INDEX}; prepare it with `everstep data prepare`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder}/{INDEX} is damaged ({error!r}); prepare the dataset again") from error
        if document.get("format") != FORMAT:
            raise DataError(f"{folder}/{INDEX} has format {document.get('format')}; this version reads {FORMAT}")
        if document.get("digest") != index.digest:
            raise DataError(f"{folder}/{INDEX} is damaged: its digest does not match its own list of shards")
        return index


def is_remote(folder: str) -> bool:
    """Whether `folder` is a URL of a store rather than a path."""
    return "://" in folder and not folder.startswith("file://")


def local_path(folder: str) -> str:
    """`folder` as a path: without file:// and with ~ expanded."""
    return os.path.expanduser(folder.removeprefix("file://"))


def _text(folder: str) -> str:
    if is_remote(folder):
        import fsspec

        with fsspec.open(f"{folder.rstrip('/')}/{INDEX}", "r", encoding="utf-8") as remote:
            return str(remote.read())
    with open(os.path.join(local_path(folder), INDEX), encoding="utf-8") as file:
        return file.read()

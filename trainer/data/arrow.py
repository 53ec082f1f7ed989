"""A dataset of Arrow IPC shards, read from a folder by memory map or from a store through a local cache."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.index import Shard, ShardIndex, is_remote
from trainer.data.order import Ids
from trainer.data.shards import file_parts, map_shard
from trainer.errors import DataError
from trainer.storage import open_storage

Piece = dict[str, Any]


class ArrowDataset:
    """The samples of a prepared dataset folder or fsspec URL; shards are opened when first needed.

    A remote shard is fetched whole into `cache` (default `$EVERSTEP_CACHE` or ~/.cache/everstep) under the
    name of its digest, so that datasets share it and a damaged download is never used.
    """

    def __init__(self, path: str, cache: str | None = None) -> None:
        self.path = path
        self.index = ShardIndex.read(path)
        self.digest = self.index.digest
        default = os.environ.get("EVERSTEP_CACHE", os.path.join("~", ".cache", "everstep"))
        self._cache = os.path.expanduser(cache or default)
        self._starts = np.cumsum([0, *(shard.rows for shard in self.index.shards)])
        self._shards: dict[int, Piece] = {}

    def __len__(self) -> int:
        return self.index.rows

    def __getstate__(self) -> dict[str, Any]:
        # A map cannot be pickled and need not be: another process opens its own.
        return {**self.__dict__, "_shards": {}}

    def take(self, ids: Ids) -> dict[str, Tensor]:
        """One gather for each column and each shard that the ids touch."""
        if len(self.index.shards) == 1:
            return {name: torch.from_numpy(array[ids]) for name, array in self._shard(0).items()}
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        rows = ids - self._starts[numbers]
        batch: Piece = {}
        for name, column in self.index.columns.items():
            batch[name] = np.empty((len(ids), *(size or 0 for size in column.shape)), dtype=column.type)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            for name, array in self._shard(number).items():
                batch[name][here] = array[rows[here]]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _shard(self, number: int) -> Piece:
        opened = self._shards.get(number)
        if opened is None:
            opened = self._shards[number] = self._open(self.index.shards[number])
        return opened

    def _open(self, shard: Shard) -> Piece:
        path = self._fetched(shard) if is_remote(self.path) else str(open_storage(self.path).path(shard.file))
        if os.path.exists(path) and os.path.getsize(path) != shard.bytes:
            raise DataError(
                f"shard {path} is {os.path.getsize(path)} bytes where the index says {shard.bytes}; "
                "copy it back or prepare the dataset again"
            )
        rows, pieces, _ = map_shard(path, self.index.columns)
        if rows != shard.rows:
            raise DataError(f"shard {path} has {rows} rows where the index says {shard.rows}; prepare it again")
        if len(pieces) == 1:
            return pieces[0]
        # Our own shards are one piece; one of many, from another tool, costs its size in memory.
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self.index.columns}

    def _fetched(self, shard: Shard) -> str:
        """Path of the local copy of a remote shard; its digest is checked before it gets its name."""
        target = os.path.join(self._cache, "shards", f"{shard.digest}.arrow")
        if os.path.exists(target):
            return target
        import fsspec

        os.makedirs(os.path.dirname(target), exist_ok=True)
        url = f"{self.path.rstrip('/')}/{shard.file}"
        with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as folder:
            part = os.path.join(folder, "part")
            filesystem, name = fsspec.url_to_fs(url)
            try:
                filesystem.get_file(name, part)
            except FileNotFoundError:
                raise DataError(f"shard {url} is missing; copy it back or prepare it again") from None
            if file_parts(part) != shard.parts:
                raise DataError(f"shard {url} is damaged: its digest is not that of the index; upload it again")
            os.replace(part, target)
        return target

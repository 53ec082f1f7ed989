"""A dataset of Arrow IPC shards, gathered from memory maps of local files or of a node's cache of remote ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everstep.dataset.index import Column, ShardIndex
from everstep.errors import ConfigError, DataError
from everstep.trainer.data.batching import Columns, pieces, split
from everstep.trainer.data.cache.on_node import node_cache
from everstep.trainer.data.open_shards import Absent, OpenShards
from everstep.trainer.data.order import Ids
from everstep.trainer.data.randomness import draws_nothing
from everstep.trainer.data.stored_column import stored_column

if TYPE_CHECKING:
    from everstep.trainer.data.cache import ShardCache


@draws_nothing
class ArrowDataset:
    """The samples of a prepared dataset folder or fsspec URL; shards are opened when first needed.

    Shards of a store, and compressed ones of any place, go through a cache on the node's own disk.
    """

    def __init__(
        self,
        path: str,
        *,
        columns: Sequence[str] | None = None,
        cast: Mapping[str, str] | None = None,
        verify: bool = False,
        cache: Callable[[], ShardCache] | None = None,
    ) -> None:
        """
        Args:
            columns: names of those to read; None reads all.
            cast: a torch type by column, such as {"tokens": "int64"}.
            verify: check the digests of local shards as they are opened; those that come from a store always are.
            cache: makes the cache of remote and compressed shards; None is that of this user on this node.
        """
        self.path = path
        self.index = ShardIndex.read(path)
        self.digest = self.index.digest
        self.columns = _chosen(path, self.index, columns)
        self.shard_rows = [shard.rows for shard in self.index.shards]
        self.shard_files = [shard.file for shard in self.index.shards]
        self._cast = {name: _torch_type(path, self.columns, name, kind) for name, kind in (cast or {}).items()}
        self._starts = np.cumsum([0, *self.shard_rows])
        self._rows = len(self)
        self._opener = (cache or node_cache, verify)
        self._open()

    def __len__(self) -> int:
        return self.index.rows

    def __getstate__(self) -> dict[str, Any]:
        # Maps and locks cannot be pickled and need not be: another process opens its own.
        return {name: value for name, value in self.__dict__.items() if name not in ("_shards", "_lock", "_stored")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._shards = OpenShards(self.path, self.index, self.columns, *self._opener)
        self._stored = {
            name: stored_column(name, column, self._cast.get(name), self._shards)
            for name, column in self.columns.items()
        }
        sizes = [column.row_bytes for column in self._stored.values()]
        self._row_bytes = sum(sizes) if all(sizes) else 0

    @property
    def sample_bytes(self) -> float:
        """Mean size of a sample as it is stored."""
        return self.index.bytes / max(1, len(self))

    @property
    def room_bytes(self) -> int | None:
        """How much of it can be at hand at once; None where nothing has to be fetched."""
        return self._shards.room_bytes if self._shards.cache is not None else None

    def take(self, ids: Ids) -> Columns:
        """One gather a column, whatever number of shards the ids touch. Row i is sample `ids[i]`."""
        shards = self._shards_of(ids)
        with self._here(ids, shards):
            return self._gathered(self._places(ids, shards))

    def takes(self, ids: Ids, bounds: Sequence[int]) -> Iterator[Columns]:
        """As many `take`s, of the ids between each two bounds, which share the search for where their samples lie."""
        if not self._shards.keeps_all:
            return split(self.take(ids), bounds)  # before shards are let go of to make room for others
        shards = self._shards_of(ids)
        with self._here(ids, shards):
            places = self._places(ids, shards)
        columns = [(name, column.gather, places[name]) for name, column in self._stored.items()]
        return pieces(
            lambda start, stop: {name: gather(found[start:stop]) for name, gather, found in columns},
            bounds,
            self._row_bytes,
        )

    def want(self, ids: Ids) -> list[Future[None]]:
        """Begin to fetch what these samples need; nothing where the dataset is on this machine's disks.

        Only a shard that is open tells which parts hold a sample: when what was begun is done, more may be missing.
        """
        if self._shards.cache is None or self._shards.settled:
            return []
        with self._lock:
            missing = self._missing(ids, self._shards_of(ids))
        return _begun(missing, urgent=False)

    def place(self, sample: int) -> str:
        """Where a sample lies, for people: dataset, shard and row."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return f"{self.path}, {self.index.shards[number].file}, row {sample - self._starts[number]}"

    def _shards_of(self, ids: Ids) -> Ids:
        # Seen as unsigned, what is negative is too large as well.
        if ids.size and int(ids.view(np.uint64).max()) >= self._rows:
            raise IndexError(f"{self.path} has samples 0 to {self._rows - 1}, not {ids.min()} to {ids.max()}")
        return self._starts.searchsorted(ids, side="right") - 1

    def _places(self, ids: Ids, shards: Ids) -> dict[str, Ids]:
        return {name: column.places(ids, shards) for name, column in self._stored.items()}

    def _gathered(self, places: Mapping[str, Ids]) -> Columns:
        return {name: column.gather(places[name]) for name, column in self._stored.items()}

    @contextmanager
    def _here(self, ids: Ids, shards: Ids) -> Iterator[None]:
        """All of these samples is open in the block, and stays so where all shards do."""
        while not self._shards.settled:
            with self._lock:
                missing = self._missing(ids, shards)
                self._shards.kept = frozenset(shards.tolist()) if missing else frozenset()
                if not missing:
                    yield
                    return
            # Without the lock, so that others go on asking for what comes later.
            for future in _begun(missing, urgent=True):
                with suppress(CancelledError):  # another user of the shard has closed it meanwhile
                    future.result()
        yield

    def _missing(self, ids: Ids, shards: Ids) -> list[Absent]:
        """Opens the shards of these samples; returns what of them is not here yet."""
        opened, absent = self._shards.use(shards)
        for number, shard in opened.items():
            if shard.cached is not None and not shard.cached.complete:
                rows = ids[shards == number] - self._starts[number]
                parts = shard.cached.absent(self._shards.parts(number, shard, rows))
                if parts.size:
                    absent.append((shard.cached, parts))
        return absent


def _begun(missing: list[Absent], urgent: bool) -> list[Future[None]]:
    return [future for cached, parts in missing for future in cached.want(parts, urgent)]


def _chosen(path: str, index: ShardIndex, names: Sequence[str] | None) -> Mapping[str, Column]:
    for name in names or ():
        if name not in index.columns:
            raise ConfigError(f"data.columns: {path} has no column {name!r}; it has {', '.join(index.columns)}")
    return index.columns if names is None else {name: index.columns[name] for name in names}


def _torch_type(path: str, columns: Mapping[str, Column], name: str, kind: str) -> torch.dtype:
    found = getattr(torch, kind, None)
    if name not in columns:
        raise DataError(f"data.cast: {path} has no column {name!r}; it has {', '.join(columns)}")
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"data.cast.{name}={kind!r} is no type of torch; write int64, float32 or the like")
    return found

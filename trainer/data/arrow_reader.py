"""Dataset of Arrow IPC shards, read from memory maps of local files or of the node's cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.dataset.index import BYTES, TEXT, Column, ShardIndex
from everstep.errors import ConfigError, DataError
from everstep.trainer.data.address_gather import OffsetsError, Rows, gather_ragged
from everstep.trainer.data.cache import ShardCache, node_cache
from everstep.trainer.data.columns import Columns, Ragged, pieces, split
from everstep.trainer.data.open_shards import Absent, OpenShards
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.data.randomness import draws_nothing


class StoredColumn(Protocol):
    """A column of a dataset whose shards are open."""

    row_bytes: float
    """Size of a sample as it is gathered; 0 if sizes differ."""

    def places(self, ids: Ids, shards: Ids) -> NDArray[np.int64]:
        """Return the location of these samples of these shards: one row each, for `gather`."""
        ...

    def gather(self, places: NDArray[np.int64]) -> Tensor | Ragged: ...


class FixedColumn:
    """A column whose samples all have one shape."""

    def __init__(self, name: str, column: Column, kind: torch.dtype | None, shards: OpenShards) -> None:
        """Prepare the column; `kind` is the type of the gathered samples, None keeps the stored one."""
        kind = kind or torch_type(column.type)
        self._rows = Rows(column.type, tuple(size or 0 for size in column.shape), kind)
        self._origins = shards.origins[name]
        self.row_bytes = float(self._rows.width * kind.itemsize)

    def places(self, ids: Ids, shards: Ids) -> NDArray[np.int64]:
        return self._origins[shards] + ids * np.int64(self._rows.width)

    def gather(self, places: NDArray[np.int64]) -> Tensor:
        return self._rows(places)


class RaggedColumn:
    """A column whose samples differ in length."""

    row_bytes = 0.0

    def __init__(self, name: str, column: Column, kind: torch.dtype | None, shards: OpenShards) -> None:
        self._name, self._shards = name, shards
        self._stored = torch_type("uint8" if column.type in (TEXT, BYTES) else column.type)
        self._kind = kind or self._stored
        self._origins, self._extents = shards.origins[name], shards.extents[name]

    def places(self, ids: Ids, shards: Ids) -> NDArray[np.int64]:
        return np.stack([self._origins[shards] + ids, shards], axis=1)

    def gather(self, places: NDArray[np.int64]) -> Ragged:
        elements, shards = places[:, 0], places[:, 1]
        extents = self._extents[shards]
        try:
            found, bounds = gather_ragged(elements, extents[:, 0], extents[:, 1], self._stored)
        except OffsetsError as error:
            where = self._shards.location(self._name, int(shards[error.row]), int(elements[error.row]))
            raise DataError(
                f"column {self._name!r} of {where}: {error}; the shard is damaged: copy it back or prepare it again"
            ) from None
        return Ragged(found.to(self._kind), torch.from_numpy(bounds))


def stored_column(name: str, column: Column, kind: torch.dtype | None, shards: OpenShards) -> StoredColumn:
    make = RaggedColumn if column.ragged else FixedColumn
    return make(name, column, kind, shards)


@cache
def torch_type(name: str) -> torch.dtype:
    """Return torch's type for NumPy's name of it."""
    return torch.from_numpy(np.empty(0, name)).dtype


@draws_nothing
class ArrowDataset:
    """The samples of a prepared dataset folder or fsspec URL; shards are opened when first needed.

    Remote shards, and compressed ones anywhere, are read through a cache on the node's own disk.
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
        """Open the dataset.

        Args:
            columns: names of the columns to read; None reads all.
            cast: a torch type by column, such as {"tokens": "int64"}.
            verify: check the digests of local shards when they are opened; remote shards are always checked.
            cache: makes the cache of remote and compressed shards; None is the cache of this user on this node.
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
        """Mean size of a stored sample."""
        return self.index.bytes / max(1, len(self))

    @property
    def tokens_per_sample(self) -> int | None:
        """Tokens of each sample that are predicted, if it was packed; the last one is only a target."""
        pack, column = self.index.attributes.get("pack"), self.index.columns.get("tokens")
        known = type(pack) is int and column is not None and column.shape == (pack + 1,)
        return pack if known else None

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the dataset that the node cache can hold at once; None if nothing must be downloaded."""
        return self._shards.room_bytes if self._shards.cache is not None else None

    def take(self, ids: Ids) -> Columns:
        """Gather samples, one gather per column for any number of shards. Row i is sample `ids[i]`."""
        shards = self._shards_of(ids)
        with self._here(ids, shards):
            return self._gathered(self._places(ids, shards))

    def take_batches(self, ids: Ids, bounds: Sequence[int]) -> Iterator[Columns]:
        """Yield the `take` of the ids between each two bounds; they share the search for the rows."""
        if not self._shards.keeps_all:
            return split(self.take(ids), bounds)  # gathered before shards are closed for others
        shards = self._shards_of(ids)
        with self._here(ids, shards):
            places = self._places(ids, shards)
        columns = [(name, column.gather, places[name]) for name, column in self._stored.items()]
        return pieces(
            lambda start, stop: {name: gather(found[start:stop]) for name, gather, found in columns},
            bounds,
            self._row_bytes,
        )

    def prefetch(self, ids: Ids) -> list[Future[None]]:
        """Begin to download the parts that these samples need; nothing for a local dataset.

        Only an open shard tells which parts hold a sample: when these downloads are done, more parts may be missing.
        """
        if self._shards.cache is None or self._shards.settled:
            return []
        with self._lock:
            missing = self._missing(ids, self._shards_of(ids))
        return _begun(missing, urgent=False)

    def location(self, sample: int) -> str:
        """Return the location of a sample as text: dataset, shard and row."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return f"{self.path}, {self.index.shards[number].file}, row {sample - self._starts[number]}"

    def _shards_of(self, ids: Ids) -> Ids:
        # As unsigned integers, negative ids are too large as well.
        if ids.size and int(ids.view(np.uint64).max()) >= self._rows:
            raise IndexError(f"{self.path} has samples 0 to {self._rows - 1}, not {ids.min()} to {ids.max()}")
        return self._starts.searchsorted(ids, side="right") - 1

    def _places(self, ids: Ids, shards: Ids) -> dict[str, Ids]:
        return {name: column.places(ids, shards) for name, column in self._stored.items()}

    def _gathered(self, places: Mapping[str, Ids]) -> Columns:
        return {name: column.gather(places[name]) for name, column in self._stored.items()}

    @contextmanager
    def _here(self, ids: Ids, shards: Ids) -> Iterator[None]:
        """Keep all parts of these samples open in the block, and afterwards too if all shards stay open."""
        while not self._shards.settled:
            with self._lock:
                missing = self._missing(ids, shards)
                self._shards.kept = frozenset(shards.tolist()) if missing else frozenset()
                if not missing:
                    yield
                    return
            # Without the lock, so that other threads can request later samples meanwhile.
            for future in _begun(missing, urgent=True):
                with suppress(CancelledError):  # another user of the shard has closed it meanwhile
                    future.result()
        yield

    def _missing(self, ids: Ids, shards: Ids) -> list[Absent]:
        """Open the shards of these samples; return the parts that are not yet downloaded."""
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

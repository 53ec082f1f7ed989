"""Shards of a dataset that this process has mapped, with the address of each column in each."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from everstep.dataset.index import PART_BYTES, Column, Shard, ShardIndex
from everstep.dataset.mapped_shard import Mapped, RaggedArray, Stored, check_offsets, inflate, map_shard
from everstep.dataset.shard_format import file_parts
from everstep.errors import DataError
from everstep.storage import join_url, open_storage
from everstep.storage.names import leads_out
from everstep.trainer.data.address_gather import address_of, element_of

if TYPE_CHECKING:
    from everstep.trainer.data.cache import CachedShard, ShardCache

Ints = NDArray[np.int64]
MOST_MAPS = 8192
"""Shards that are open at once: Linux gives a process 65,530 maps.

A cached shard also holds three open files.
"""
FOOTER_BYTES = 64 << 10
"""Bytes at the end of a shard that hold its footer.

The footer, with the location of the columns, is far smaller.
"""


class OpenShard(NamedTuple):
    """One mapped shard."""

    arrays: Mapping[str, Stored]
    file_start: int
    """Address of the first byte of the map."""
    bytes: int
    cached: CachedShard | None
    """Its entry in the node cache; None for a local shard that is mapped directly."""


Absent = tuple["CachedShard", Ints]
"""A shard of the cache, and those of its parts that must be downloaded."""


class OpenShards:
    """Maps shards when they are needed, and closes the least recently used cached ones.

    Not thread-safe: the dataset holds a lock around it. Nothing here waits for a store, unless shards are compressed.
    """

    def __init__(
        self, path: str, index: ShardIndex, columns: Mapping[str, Column], cache: Callable[[], ShardCache], verify: bool
    ) -> None:
        self.extents = {name: np.zeros((len(index.shards), 2), np.int64) for name in columns}
        """For each column the address and the number of its values in each shard, valid while it is open.

        No offset may lead beyond them.
        """
        self.origins = {name: np.zeros(len(index.shards), np.int64) for name in columns}
        """Address (`element_of`) that sample 0 of the dataset would have if the shard extended back to it.

        If samples differ in length, it is the address of the offset of sample 0.
        """
        self._starts = np.cumsum([0, *(shard.rows for shard in index.shards)]).tolist()
        self.settled = False
        """True if every shard is open for good and complete, so that no check is needed any more."""
        self._storage = open_storage(path)
        self._index = index
        self._columns = columns
        self._verify = verify
        self._compressed = index.is_compressed
        self.cache = cache() if self._compressed or self._storage.path() is None else None
        """The node cache, if the shards must be read through one."""
        self.room_bytes = self.cache.limit_bytes // 2 if self.cache is not None else index.bytes
        """Limit of the bytes that this process keeps open: half of the cache, to leave space for other shards."""
        self._most_open = MOST_MAPS if self.cache is None else min(MOST_MAPS, max(16, _file_limit() // 8))
        self.keeps_all = index.bytes <= self.room_bytes and len(index.shards) <= self._most_open
        """True if an open shard stays open: shards that `use` has opened may be gathered at any time."""
        self.kept: frozenset[int] = frozenset()
        """Shards that stay open because a thread waits for their parts."""
        self._open: dict[int, OpenShard] = {}
        self._coming: dict[int, CachedShard] = {}
        """Shards that cannot be mapped yet."""
        self._incomplete: set[int] = set()
        self._bytes = 0

    def use(self, shards: Ints) -> tuple[dict[int, OpenShard], list[Absent]]:
        """Open the shards with these numbers; all others may have been closed.

        For shards that cannot be opened yet, return the parts that must be downloaded first.
        """
        found, absent = {}, []
        for number in sorted(set(shards.tolist())):  # np.unique imports numpy.ma, which takes a tenth of a second
            shard = self._open.pop(number, None) or self._map(number)
            if not isinstance(shard, OpenShard):
                absent.append(shard)
                continue
            self._open[number] = found[number] = shard  # to the end: the first entry is the least recently used
            if number in self._incomplete and (shard.cached is None or shard.cached.complete):
                self._incomplete.discard(number)
        if self._bytes > self.room_bytes or self._is_crowded():
            self._make_room(frozenset(shards.tolist()) | self.kept)
        self.settled = self.keeps_all and not self._incomplete and len(self._open) == len(self._index.shards)
        return found, absent

    def parts(self, number: int, shard: OpenShard, rows: Ints) -> Ints:
        """Return the parts of the file that hold these rows; all parts if samples differ in length."""
        found = []
        for name, column in self._columns.items():
            if column.ragged:
                return np.arange(len(self._index.shards[number].parts))
            size = row_bytes(column)
            starts = self.extents[name][number, 0] - shard.file_start + rows * size
            first, last = starts // PART_BYTES, (starts + size - 1) // PART_BYTES
            found += [first + step for step in range(int((last - first).max(initial=0)) + 1)]
        return np.unique(np.minimum(np.concatenate(found), len(self._index.shards[number].parts) - 1))

    def _is_crowded(self) -> bool:
        return len(self._open) + len(self._coming) > self._most_open

    def _make_room(self, used: frozenset[int]) -> None:
        for number in [number for number in self._open if number not in used]:
            if self._bytes <= self.room_bytes and not self._is_crowded():
                return
            shard = self._open.pop(number)
            self._bytes -= shard.bytes
            self._incomplete.discard(number)
            if shard.cached is not None:
                shard.cached.close()
        for number in [number for number in self._coming if number not in used]:
            if not self._is_crowded():
                return
            self._coming.pop(number).close()

    def _map(self, number: int) -> OpenShard | Absent:
        shard = self._index.shards[number]
        if self.cache is None:
            mapped = map_shard(path := self._checked(shard), self._columns)
            if self._verify:
                check_offsets(path, mapped)
            return self._mapped(number, mapped, None)
        cached = self._coming.pop(number, None) or self._placed(shard)
        absent, rest = cached.absent(_ends(shard)), cached.absent(np.arange(len(shard.parts)))
        if not absent.size:
            mapped = map_shard(cached.path, self._columns)
            if not (mapped.copied and rest.size):
                return self._mapped(number, mapped, cached)
            absent = rest
        self._coming[number] = cached
        return cached, absent

    def _mapped(self, number: int, mapped: Mapped, cached: CachedShard | None) -> OpenShard:
        shard = self._index.shards[number]
        if mapped.rows != shard.rows:
            path = cached.path if cached is not None else self._storage.path(shard.file)
            raise DataError(f"shard {path} has {mapped.rows} rows where the index says {shard.rows}; prepare it again")
        opened = OpenShard(mapped.joined(), mapped.base, shard.bytes, cached)
        for name, array in opened.arrays.items():
            values, rows = array if isinstance(array, RaggedArray) else (array, array)
            self.extents[name][number] = address_of(values), len(values)
            self.origins[name][number] = element_of(rows) - self._starts[number] * math.prod(rows.shape[1:])
        self._bytes += shard.bytes
        if cached is not None and not cached.complete:
            self._incomplete.add(number)
        return opened

    def _placed(self, shard: Shard) -> CachedShard:
        """Return the shard's entry in the cache; a compressed shard is downloaded completely."""
        cache = cast("ShardCache", self.cache)
        if self._compressed:
            return cache.inflated(self._storage, shard, inflate)
        return cache.open(self._storage, shard)

    def location(self, column: str, number: int, place: int) -> str:
        """Return, for a message, the row of a shard whose offset or value is at this element."""
        row = place - int(self.origins[column][number]) - self._starts[number]
        return f"{join_url(self._storage.url, self._index.shards[number].file)}, row {row}"

    def _checked(self, shard: Shard) -> str:
        path = str(self._storage.path(shard.file))
        if leads_out(self._storage, "", shard.file):
            raise DataError(f"shard {path} is a link out of its dataset's folder; copy the file there")
        if os.path.exists(path) and os.path.getsize(path) != shard.bytes:
            raise DataError(
                f"shard {path} is {os.path.getsize(path)} bytes where the index says {shard.bytes}; "
                "copy it back or prepare the dataset again"
            )
        if self._verify and os.path.exists(path) and file_parts(path) != shard.parts:
            raise DataError(f"shard {path} is damaged: its digests are not the index's; copy it back")
        return path


def _ends(shard: Shard) -> Ints:
    """Return the parts that hold the location of the shard's columns."""
    last = len(shard.parts) - 1
    return np.unique([0, max(0, shard.bytes - FOOTER_BYTES) // PART_BYTES, last])


def _file_limit() -> int:
    """Return the number of files that this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def row_bytes(column: Column) -> int:
    """Return the size of one sample of a column whose samples all have one shape."""
    return math.prod(size or 0 for size in column.shape) * np.dtype(column.type).itemsize

"""Node cache of remote shards: parts are downloaded when needed, verified, and shared by processes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.config import LoaderConfig
from everstep.dataset.index import PART_BYTES, Shard, part_digest
from everstep.errors import DataError
from everstep.storage import Buffer, Storage, join_url
from everstep.trainer.data.cache.downloads import ELSEWHERE_S, DamagedError, DownloadPool, Stats
from everstep.trainer.data.cache.files import ShardFiles
from everstep.trainer.data.cache.folder import CacheFolder

Parts = NDArray[np.int64]
_NONE = np.empty(0, np.int64)
INFLATED = ".inflated"
"""Ending of the name of a shard that was compressed; it is one part, whatever its size."""
SHARE_OF_DISK = 0.5
"""Size of the cache by default, as a share of its disk."""
_INFLATING = (1 << 20) - 1  # the claim for decompression, at a number that no part has


class ShardCache:
    """Shards of any datasets in a folder of the node, limited to `limit_bytes` except for open shards.

    Any number of processes and jobs share a folder; each downloads with up to `parallel` threads of its own, which a
    forked child starts anew. It can be pickled.
    """

    def __init__(self, folder: str, limit_bytes: int, *, parallel: int = 8) -> None:
        self._folder = CacheFolder(folder, limit_bytes)
        self._parallel = parallel
        self._crews: dict[int, DownloadPool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_crews": {}}

    def open(self, storage: Storage, shard: Shard) -> CachedShard:
        """Return the shard's local file with the parts present; it is not evicted before it is closed."""
        return CachedShard(self, self._folder.open(shard.digest, shard.bytes, len(shard.parts)), storage, shard)

    def inflated(self, storage: Storage, shard: Shard, inflate: Callable[[str, str], None]) -> CachedShard:
        """Return the shard as `inflate(path, to)` decompresses it, complete; this is done once per node."""
        name = shard.digest + INFLATED
        while True:
            files = self._folder.open(name, None, 1)
            if files.marks.all():
                return CachedShard(self, files, storage, shard)
            if self._folder.claim(shard.digest, _INFLATING):
                try:
                    self._inflate(storage, shard, inflate, files)
                finally:
                    self._folder.release(shard.digest, _INFLATING)
            else:
                time.sleep(ELSEWHERE_S)

    def _inflate(self, storage: Storage, shard: Shard, inflate: Callable[[str, str], None], files: ShardFiles) -> None:
        whole = f"{self._folder.stem(shard.digest + INFLATED)}.tmp"
        source = self.open(storage, shard)
        try:
            source.need(np.arange(len(shard.parts)))
            self._folder.with_room(lambda: inflate(source.path, whole))
        finally:
            source.close()
        self._folder.adopt(files, whole)
        self._folder.drop(shard.digest)

    @property
    def stats(self) -> Stats:
        """Return the counts of this process's downloads so far."""
        return replace(self.crew.stats, evictions=self._folder.evictions)

    @property
    def limit_bytes(self) -> int:
        """Limit of the bytes of shards in the folder."""
        return self._folder.limit_bytes

    @property
    def folder(self) -> CacheFolder:
        return self._folder

    @property
    def crew(self) -> DownloadPool:
        """Download threads of this process; the parent's threads and locks are not valid after a fork."""
        pid = os.getpid()
        if pid not in self._crews:
            self._crews.setdefault(pid, DownloadPool(self._parallel))
            for parent in self._crews.keys() - {pid}:
                self._crews.pop(parent, None)
        return self._crews[pid]


class CachedShard:
    """One shard with some parts present.

    `path` is a file of the full size, which can be memory-mapped at once.
    """

    def __init__(self, cache: ShardCache, files: ShardFiles, storage: Storage, shard: Shard) -> None:
        self.path = files.path
        self._cache, self._storage, self._shard = cache, storage, shard
        self._files: ShardFiles | None = files
        self._complete = bool(files.marks.all())

    @property
    def complete(self) -> bool:
        """True if every part is present."""
        if not self._complete:
            self._complete = bool(self._open().marks.all())
        return self._complete

    def absent(self, parts: Parts) -> Parts:
        """Return those of `parts` that are not present yet."""
        if self._complete:
            return _NONE
        missing = parts[~self._open().marks[parts]]
        if not missing.size:
            _ = self.complete  # so that the next check costs nothing
        return missing

    def want(self, parts: Parts, urgent: bool = False) -> list[Future[None]]:
        """Begin to download those that are not present, urgent ones first, without waiting for them."""
        return self._fetch(self.absent(parts), urgent)

    def need(self, parts: Parts) -> None:
        """Wait until all the parts are present.

        Raises:
            DataError: the store's bytes do not match the index.
            StorageError: the store fails.
        """
        while (missing := self.absent(parts)).size:
            for future in self._fetch(missing, urgent=True):
                try:
                    future.result()
                except CancelledError:  # another user of the shard has closed it meanwhile
                    continue

    def _fetch(self, missing: Parts, urgent: bool) -> list[Future[None]]:
        files = self._open()
        pieces = [Part(self._cache.folder, files, self._storage, self._shard, part) for part in missing.tolist()]
        return self._cache.crew.fetch(pieces, urgent) if pieces else []

    def _open(self) -> ShardFiles:
        if self._files is None:
            raise ValueError(f"shard {self.path} of the cache was closed")
        return self._files

    def close(self) -> None:
        """Allow eviction once no process has the shard open; existing memory maps remain valid."""
        files, self._files = self._files, None
        if files is None:
            return
        files.touch()
        if not self._complete:
            self._cache.crew.forget(lambda piece: isinstance(piece, Part) and piece.is_of(files))


class Part:
    """One part that is downloaded from the store to the cache.

    It keeps the shard's files open, and so from eviction, as long as any thread waits for it. A late response, after a
    hedged request has delivered the part, must not take up the space of a shard.
    """

    def __init__(self, folder: CacheFolder, files: ShardFiles, storage: Storage, shard: Shard, part: int) -> None:
        self.key = (files.identity, part)
        self._files: ShardFiles | None = files
        self._folder, self._storage, self._shard, self._part = folder, storage, shard, part

    def is_of(self, files: ShardFiles) -> bool:
        """True if it is a part of the shard that has these files open."""
        return self._files is files

    def here(self) -> bool:
        """True if another process has downloaded it, or a killed one had written its bytes without the mark."""
        files, part = self._files, self._part
        if files is None or files.marks[part]:
            return True
        if files.has_bytes(part) and part_digest(files.read(part)) == self._shard.parts[part]:
            files.mark(part)
        return bool(files.marks[part])

    def claim(self) -> bool:
        return self._folder.claim(self._shard.digest, self._part)

    def release(self) -> None:
        self._folder.release(self._shard.digest, self._part)

    def download(self) -> Buffer:
        try:
            return self._verified()
        except FileNotFoundError:
            raise DataError(f"shard {self._url} is missing; copy it back or prepare the dataset again") from None

    def _verified(self) -> Buffer:
        start = self._part * PART_BYTES
        stop = min(start + PART_BYTES, self._shard.bytes)
        data = self._storage.read_range(self._shard.file, start, stop)
        if len(data) != stop - start:
            self._check_size()
            raise DamagedError(f"{len(data)} bytes came in place of {stop - start}")
        if part_digest(data) != self._shard.parts[self._part]:
            raise DamagedError("its digest is not that of the index")
        return data

    def _check_size(self) -> None:
        size = self._storage.size(self._shard.file)
        if size != self._shard.bytes:
            raise DataError(
                f"shard {self._url} is {size} bytes where the index says {self._shard.bytes}; "
                "copy it back or prepare the dataset again"
            )

    def keep(self, data: Buffer) -> None:
        if (files := self._files) is not None:
            self._folder.write(files, self._part, data)

    def end(self) -> None:
        self._files = None

    def damaged(self, why: str) -> DataError:
        return DataError(
            f"part {self._part} of shard {self._url} is damaged: {why}, however often it is downloaded; "
            f"`everstep data verify {self._storage.url}` tells which shards to upload again"
        )

    @property
    def _url(self) -> str:
        return join_url(self._storage.url, self._shard.file)


def node_cache(loader: LoaderConfig | None = None) -> ShardCache:
    """Return the cache of this user on this node, set by the keys under `loader`.

    Nothing is written before the cache is used.
    """
    loader = loader or LoaderConfig()
    folder = loader.cache_folder()
    limit = int(loader.cache_gb * 1e9) if loader.cache_gb is not None else int(_disk(folder) * SHARE_OF_DISK)
    return ShardCache(folder, limit)


def _disk(folder: str) -> int:
    """Return the size in bytes of the disk on which a folder is, or will be."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).total

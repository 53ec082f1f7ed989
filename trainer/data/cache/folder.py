"""Folder of the node cache with parts of remote shards, shared by processes and jobs of a node.

Its size is bounded, and a kill leaves it valid.

FOLDER/lock                  locked while the folder is changed; holds the bytes in it, as last counted
FOLDER/claims                locks of the downloads in progress
FOLDER/everstep-cache        the mark: FOLDER/shards was made by everstep, which removes files there
FOLDER/shards/STEM.arrow     a shard; STEM.have is the map of its parts, STEM.tmp a file that is being written
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from everstep.dataset.index import PART_BYTES
from everstep.errors import ConfigError, StorageError
from everstep.storage import Buffer
from everstep.trainer.data.cache.files import Claims, ShardFiles

LOG = logging.getLogger("everstep")
T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSING_S, CLOSING_LOOK_S = 5.0, 0.05
"""Seconds to wait for space on a full disk, and between two checks."""
SLACK = 16
"""Eviction leaves limit / SLACK bytes free, so that most downloads need no scan of the folder."""
PARTS_LIMIT = 1 << 20
"""Limit of the parts of a shard.

A claim is a byte of a file: 40 bits of its offset are from the shard's digest, the lower bits are the part.
"""
MARK = "everstep-cache"
_OURS = re.compile(r"[0-9a-f]{32}(\.inflated)?\.(arrow|have|tmp)")
"""Names of files that are ours, and may be removed."""
_USED = struct.Struct("<q")


class CacheFolder:
    """The cached shards, their locks and the size limit."""

    def __init__(self, folder: str, limit_bytes: int) -> None:
        if limit_bytes <= 0:
            raise ConfigError(f"a cache of {limit_bytes} bytes holds nothing; loader.cache_gb must be > 0")
        self.folder = os.path.realpath(os.path.expanduser(folder))
        self.limit_bytes = limit_bytes
        self.evictions = 0
        self._shards = os.path.join(self.folder, "shards")
        self._is_ours = False
        self._claims = Claims(os.path.join(self.folder, "claims"))
        self._look_at = 0  # bytes above which the folder is scanned again; 0: at the first download
        self._warned: set[str] = set()

    def stem(self, name: str) -> str:
        """Return the path of a shard's files, without the ending."""
        return os.path.join(self._shards, name)

    def open(self, name: str, size: int | None, parts: int) -> ShardFiles:
        """Return a shard's files, new ones if none fit; a `size` of None accepts any."""
        if parts >= PARTS_LIMIT:
            raise StorageError(f"a shard of {parts} parts is over the cache's limit of {PARTS_LIMIT}; use more shards")
        return self.with_room(lambda: self._open(self.stem(name), size, parts))

    def _open(self, stem: str, size: int | None, parts: int) -> ShardFiles:
        with self._locked():
            files = ShardFiles(stem, parts)
            if not files.fit(size):
                # A process that has the old files open keeps them; they remain complete.
                _unlink(stem)
                files = ShardFiles(stem, parts)
                files.clear(size or 0)
            files.pin()
        return files

    def claim(self, digest: str, part: int) -> bool:
        """True if this caller is now the one on the node that downloads the part."""
        return self._claims.take(int(digest[:10], 16) * PARTS_LIMIT + part)

    def release(self, digest: str, part: int) -> None:
        self._claims.release(int(digest[:10], 16) * PARTS_LIMIT + part)

    # ---------------------------------------------------------------------------------------------- the limit

    def write(self, files: ShardFiles, part: int, data: Buffer) -> None:
        """Write and mark a verified part, after eviction if needed."""

        def write() -> None:
            # The space is reserved under the lock, so that other processes count it, and filled outside of it.
            with self._locked() as lock:
                self._make_room(lock, len(data))
                files.reserve(part, len(data))
            files.write(part, data)

        self.with_room(write)

    def adopt(self, files: ShardFiles, whole: str) -> None:
        """Make the file `whole` the shard of `files`."""
        with self._locked() as lock:
            files.replace(whole)
            self._look_at = 0
            self._make_room(lock, 0)

    def _make_room(self, lock: int, count: int) -> None:
        """Evict if `count` more bytes would exceed the limit."""
        counted = os.pread(lock, _USED.size, 0)
        used = count + (_USED.unpack(counted)[0] if len(counted) == _USED.size else 0)
        if used > max(self.limit_bytes, self._look_at) or self._look_at == 0:
            used = count + self._evict(self.limit_bytes - count, self.limit_bytes // SLACK)
            # If all that remains is open, the next scan waits until much more has been written.
            self._look_at = max(self.limit_bytes, used + self.limit_bytes // SLACK)
            if used > self.limit_bytes:
                over = f"holds {used / 1e9:.3g} GB, over its limit of {self.limit_bytes / 1e9:.3g} GB, and all are open"
                self._warn(f"{over}; raise loader.cache_gb")
        os.pwrite(lock, _USED.pack(used), 0)

    def _warn(self, what: str) -> None:
        """Log a warning once, whatever sizes it mentions."""
        kind = what.rpartition(";")[2]
        if kind not in self._warned:
            self._warned.add(kind)
            LOG.warning("the cache %s %s", self.folder, what)

    def with_room(self, write: Callable[[], T]) -> T:
        """Call `write`, again after each eviction while the disk is full.

        Open shards cannot be evicted, and evicted ones take space as long as a process has them open. So when nothing
        can be evicted, wait some seconds for a thread to close one.

        Raises:
            StorageError: the cache cannot be written to; the message is one line.
        """
        closing_until: float | None = None
        while True:
            try:
                return write()
            except OSError as error:
                now = time.monotonic()
                if error.errno in FULL and self._shrink():
                    self._warn("has a disk that is full below its limit; lower loader.cache_gb")
                    closing_until = now + CLOSING_S
                elif error.errno in FULL and (closing_until is None or now < closing_until):
                    closing_until = closing_until or now + CLOSING_S
                    time.sleep(CLOSING_LOOK_S)
                else:
                    where = "with more room" if error.errno in FULL else "that you may write to"
                    raise StorageError(
                        f"cannot write to the cache {self.folder}: {error.strerror or error}; "
                        f"set loader.cache to a folder {where}"
                    ) from error

    def _shrink(self) -> bool:
        """Evict below the limit, since the disk is smaller than that; True if anything was evicted."""
        before = self.evictions
        with self._locked() as lock:
            used = sum(count for _, count, _ in self._entries())
            os.pwrite(lock, _USED.pack(self._evict(used - max(used // SLACK, 2 * PART_BYTES), 0)), 0)
        return self.evictions > before

    def _evict(self, goal: int, slack: int) -> int:
        """If over `goal` bytes are stored, evict the least recently used shards; return the bytes left.

        Eviction continues until `slack` bytes fewer than `goal` are left.
        """
        entries = sorted(self._entries())
        used = sum(count for _, count, _ in entries)
        if used <= goal:
            return used
        for _, count, stem in entries:
            if used <= goal - slack:
                break
            if self._drop(stem):
                used -= count
                self.evictions += 1
        return used

    def _entries(self) -> Iterator[tuple[int, int, str]]:
        """Yield time of last use, bytes on the disk and stem of each entry."""
        with os.scandir(self._shards) as found:
            for entry in found:
                if _OURS.fullmatch(entry.name) and not entry.name.endswith(".have"):
                    with contextlib.suppress(FileNotFoundError):  # a temporary file may have been renamed meanwhile
                        status = entry.stat(follow_symlinks=False)
                        yield status.st_mtime_ns, status.st_blocks * 512, entry.path.rpartition(".")[0]

    def drop(self, name: str) -> None:
        """Remove a shard that will not be needed again, unless a process has it open."""
        with self._locked():
            self._drop(self.stem(name))

    def _drop(self, stem: str) -> bool:
        try:
            have = os.open(f"{stem}.have", os.O_RDWR)
        except FileNotFoundError:  # so no process has it open
            _unlink(stem)
            return True
        try:
            fcntl.flock(have, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _unlink(stem)
        except BlockingIOError:
            return False
        finally:
            os.close(have)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Lock the folder against all other threads and processes; yield the lock's descriptor."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        if not self._is_ours:
            self._claim_folder()
        lock = os.open(os.path.join(self.folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            # Unlocked explicitly, not by the close: a child that was forked meanwhile has inherited the lock.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _claim_folder(self) -> None:
        """Make the folder of the shards, or check that it is a cache: eviction must remove no other files."""
        mark = os.path.join(self.folder, MARK)
        os.makedirs(self._shards, mode=0o700, exist_ok=True)
        if os.path.islink(self._shards):
            raise ConfigError(f"loader.cache={self.folder}: its folder shards is a link; choose another folder")
        if not os.path.exists(mark):
            # A cache without a mark was just made, or is of an earlier version.
            foreign = next((name for name in sorted(os.listdir(self._shards)) if not _OURS.fullmatch(name)), None)
            if foreign is not None:
                raise ConfigError(
                    f"loader.cache={self.folder}: {self._shards} holds files that are no cache ({foreign!r}), "
                    "and a cache removes files; choose another folder"
                )
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT, 0o600))
        self._is_ours = True


def _unlink(stem: str) -> None:
    # The map first: a shard without one counts as empty, so a kill in between does no harm.
    for ending in ("have", "arrow", "tmp"):
        Path(f"{stem}.{ending}").unlink(missing_ok=True)

"""Files of a shard in the node cache: a sparse file, and a map of the parts that are present.

The map has a byte per part, then a stamp: the boot of the machine in which it was made, and the file it belongs to.
After a power failure the map may be on the disk without the bytes it promises, so marks of an earlier boot are void.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from everstep.dataset.index import PART_BYTES
from everstep.storage import Buffer

_BOOT = 36
_STAMP_BYTES = _BOOT + 20

# Not os.posix_fallocate: on a file system without support it writes zeros, perhaps over newer data.
_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux only
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ShardFiles:
    """Open files of a shard; a shard is not evicted while any process has its files open.

    Descriptors are closed with the last reference and not before: a download that still runs must never write to a
    descriptor number that has been reused for another file.
    """

    def __init__(self, stem: str, parts: int) -> None:
        self._data = self._have = -1
        self.path = f"{stem}.arrow"
        self._parts = parts
        self._data = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._have = os.open(f"{stem}.have", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self.identity = os.fstat(self._data).st_ino
        self.marks: NDArray[np.bool_] = np.zeros(parts, np.bool_)

    def __del__(self) -> None:
        for handle in (self._data, self._have):
            if handle >= 0:
                os.close(handle)

    def fit(self, size: int | None) -> bool:
        """True if the file has this size (None: any) and the map belongs to this very file."""
        stamp = os.pread(self._have, _STAMP_BYTES, self._parts)
        return stamp[_BOOT:] == self._stamp()[_BOOT:] and size in (None, os.fstat(self._data).st_size)

    def clear(self, size: int) -> None:
        """Initialise new files of a shard, with no part present."""
        os.ftruncate(self._data, size)
        self._void()

    def pin(self) -> None:
        """Protect the files from eviction, and map the marks of their parts."""
        fcntl.flock(self._have, fcntl.LOCK_SH)
        if os.pread(self._have, _STAMP_BYTES, self._parts) != self._stamp():
            self._void()
        self.touch()
        view = mmap.mmap(self._have, self._parts + _STAMP_BYTES, access=mmap.ACCESS_READ)
        self.marks = np.frombuffer(view, np.bool_, count=self._parts)

    def touch(self) -> None:
        """Make the shard the most recently used, so that it is evicted last."""
        os.utime(self._data)

    def _void(self) -> None:
        # Bytes and not a hole, so that setting a mark later needs no disk space.
        os.pwrite(self._have, bytes(self._parts) + self._stamp(), 0)

    def _stamp(self) -> bytes:
        return f"{_boot():{_BOOT}.{_BOOT}}{self.identity:020}".encode()

    def replace(self, whole: str) -> None:
        """Replace this shard's file by the finished file `whole`, with all parts present.

        A kill before the stamp is written leaves a map that does not fit, so everything begins anew.
        """
        os.replace(whole, self.path)
        self.identity = os.stat(self.path).st_ino
        os.pwrite(self._have, self._stamp(), self._parts)
        os.pwrite(self._have, b"\1" * self._parts, 0)

    def has_bytes(self, part: int) -> bool:
        """True if the part was ever written; a part that was never downloaded is a hole in the file."""
        start = part * PART_BYTES
        try:
            return os.lseek(self._data, start, os.SEEK_DATA) < start + PART_BYTES
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EINVAL):
                raise
            return error.errno == errno.EINVAL  # EINVAL: the file system reports no holes; ENXIO: a hole up to the end

    def read(self, part: int) -> bytes:
        return os.pread(self._data, PART_BYTES, part * PART_BYTES)

    def reserve(self, part: int, count: int) -> None:
        """Reserve the disk space of a part; until it is written it is a hole to `has_bytes`.

        If the file system cannot do this, pending parts are not counted before they are written.
        """
        if _fallocate is None or _fallocate(self._data, 0, part * PART_BYTES, count) == 0:
            return
        if (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise OSError(code, os.strerror(code))

    def write(self, part: int, data: Buffer) -> None:
        """Write a part's bytes and then mark it, so that a mark implies the bytes."""
        view, at = memoryview(data), part * PART_BYTES
        while view:
            count = os.pwrite(self._data, view, at)
            view, at = view[count:], at + count
        self.mark(part)

    def mark(self, part: int) -> None:
        """Mark the part as present, for all processes of the node."""
        os.pwrite(self._have, b"\1", part)


@functools.cache
def _boot() -> str:
    with contextlib.suppress(FileNotFoundError):  # systems other than Linux do not report a boot
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class Claims:
    """Claims of downloads on a node: a process locks one byte of a file per part.

    A kill releases the lock.

    POSIX locks are used because a fork does not inherit them. Any close of the file would drop all locks of the
    process, so the file is opened once for all caches of the folder and stays open. A lost claim costs only a second
    download: all bytes that are written were verified first.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def take(self, byte: int) -> bool:
        """Claim the byte; False if another thread or process has it."""
        token = object()
        if _HELD.setdefault((os.getpid(), self._path, byte), token) is not token:
            return False
        try:
            fcntl.lockf(self._file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            del _HELD[os.getpid(), self._path, byte]
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def release(self, byte: int) -> None:
        fcntl.lockf(self._file(), fcntl.LOCK_UN, 1, byte)
        del _HELD[os.getpid(), self._path, byte]

    def _file(self) -> int:
        if self._path not in _FILES:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            if _FILES.setdefault(self._path, handle) != handle:
                os.close(handle)
        return _FILES[self._path]


_HELD: dict[tuple[int, str, int], object] = {}
"""Claims of this process's threads.

A lock excludes other processes only, so the kernel would grant it twice.
"""
_FILES: dict[str, int] = {}

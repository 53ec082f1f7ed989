"""What lies in a node's cache for one shard: a sparse file, and a map that says which of its parts are here.

The map is a byte for each part, then a stamp: which boot of the machine it was made in and which file it speaks of.
After a power cut a map may be on the disk and the bytes it promises not, so marks of an earlier boot are void.
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

# Not os.posix_fallocate: where the file system cannot do it, that writes zeros, perhaps over what came meanwhile.
_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux only
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ShardFiles:
    """A shard's two files, open; while any process has them open they are not evicted.

    Descriptors are closed with the last reference and not before: a download that still runs must never write to
    a number that by then is another file's.
    """

    def __init__(self, stem: str, parts: int) -> None:
        self._data = self._have = -1
        self.path = f"{stem}.arrow"
        self._parts = parts
        self._data = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self._have = os.open(f"{stem}.have", os.O_RDWR | os.O_CREAT, 0o600)
        self.identity = os.fstat(self._data).st_ino
        self.marks: NDArray[np.bool_] = np.zeros(parts, np.bool_)

    def __del__(self) -> None:
        for handle in (self._data, self._have):
            if handle >= 0:
                os.close(handle)

    def fit(self, size: int | None) -> bool:
        """Whether the file is of this size (None: any) and the map is of this very file."""
        stamp = os.pread(self._have, _STAMP_BYTES, self._parts)
        return stamp[_BOOT:] == self._stamp()[_BOOT:] and size in (None, os.fstat(self._data).st_size)

    def clear(self, size: int) -> None:
        """Make new files those of a shard of which nothing is here."""
        os.ftruncate(self._data, size)
        self._void()

    def pin(self) -> None:
        """Keep the files from eviction, and follow what is marked in them."""
        fcntl.flock(self._have, fcntl.LOCK_SH)
        if os.pread(self._have, _STAMP_BYTES, self._parts) != self._stamp():
            self._void()
        self.touch()
        view = mmap.mmap(self._have, self._parts + _STAMP_BYTES, access=mmap.ACCESS_READ)
        self.marks = np.frombuffer(view, np.bool_, count=self._parts)

    def touch(self) -> None:
        """Make it the most recently used, the last that is evicted."""
        os.utime(self._data)

    def _void(self) -> None:
        # Bytes and not a hole, so that a mark which is set later needs no room on the disk.
        os.pwrite(self._have, bytes(self._parts) + self._stamp(), 0)

    def _stamp(self) -> bytes:
        return f"{_boot():{_BOOT}.{_BOOT}}{self.identity:020}".encode()

    def replace(self, whole: str) -> None:
        """Put the finished file `whole` in the place of this shard's, all of it here.

        A kill before the stamp is written leaves a map that does not fit, so everything begins anew.
        """
        os.replace(whole, self.path)
        self.identity = os.stat(self.path).st_ino
        os.pwrite(self._have, self._stamp(), self._parts)
        os.pwrite(self._have, b"\1" * self._parts, 0)

    def has_bytes(self, part: int) -> bool:
        """Whether anything was ever written there; what was never downloaded is a hole in the file."""
        start = part * PART_BYTES
        try:
            return os.lseek(self._data, start, os.SEEK_DATA) < start + PART_BYTES
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.EINVAL):
                raise
            return error.errno == errno.EINVAL  # a file system that cannot tell; ENXIO is hole up to the end

    def read(self, part: int) -> bytes:
        return os.pread(self._data, PART_BYTES, part * PART_BYTES)

    def reserve(self, part: int, count: int) -> None:
        """Take the room on the disk that a part will fill; until then it is a hole to `has_bytes`.

        Where this cannot be done, parts on their way are not counted before they are written.
        """
        if _fallocate is None or _fallocate(self._data, 0, part * PART_BYTES, count) == 0:
            return
        if (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise OSError(code, os.strerror(code))

    def write(self, part: int, data: Buffer) -> None:
        """Write a part's bytes and then mark it, so who sees the mark sees the bytes."""
        view, at = memoryview(data), part * PART_BYTES
        while view:
            count = os.pwrite(self._data, view, at)
            view, at = view[count:], at + count
        self.mark(part)

    def mark(self, part: int) -> None:
        """Tell all processes of the node that the part is here."""
        os.pwrite(self._have, b"\1", part)


@functools.cache
def _boot() -> str:
    with contextlib.suppress(FileNotFoundError):  # elsewhere than on Linux nobody tells of a power cut
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


class Claims:
    """Who of a node downloads what: a byte of one file is locked by the process that does; a kill gives it up.

    The locks are of the POSIX kind because those are not inherited by a fork. Any close of the file would drop
    all that the process holds, so it is opened once for all caches of the folder, and stays open. Nothing but
    work done twice depends on claims: what is written was verified, by whomever.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def take(self, byte: int) -> bool:
        """Whether the caller is now the one; False when another thread or process is."""
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
"""Claims of this process's own threads: the kernel would grant one thread what another holds."""
_FILES: dict[str, int] = {}

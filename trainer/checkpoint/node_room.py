"""Room for automatic copies on a node: never more than it can spare, and nothing that stays for good."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from pathlib import Path

import psutil

from everstep.control_group import memory_usage
from everstep.storage import LocalStorage

PARTS = 4
"""A copy may take a quarter of what is free, so at most three take less than three quarters."""
MARK = ".automatic"
"""Ending of the empty file beside a run's folder that says that its copies are automatic."""
STALE_S = 86400.0
"""Seconds after which another run removes the copies of a run that did not come back."""
IN_MEMORY = ("tmpfs", "ramfs")


def free_bytes(folder: Path) -> int:
    """Return the bytes that a folder has room for: on its disk, and in the memory that a RAM disk takes."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if not in_memory(folder):
        return free
    group = memory_usage()
    return min(free, psutil.virtual_memory().available, free if group is None else group.free)


@functools.cache
def in_memory(folder: Path) -> bool:
    """True if the folder is on a RAM disk."""
    real = Path(os.path.realpath(folder))
    mounts = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype in IN_MEMORY


def mark(storage: LocalStorage) -> None:
    """Mark a run's folder as one of automatic copies."""
    storage.root.mkdir(mode=0o700, exist_ok=True)
    _mark_of(storage.root).touch(mode=0o600)


def forget(storage: LocalStorage) -> None:
    """Remove the mark, and the folder if it is empty."""
    with contextlib.suppress(OSError):
        _mark_of(storage.root).unlink(missing_ok=True)
        storage.root.rmdir()


def remove_stale(own: LocalStorage) -> None:
    """Remove automatic copies of other runs in which nothing has changed for STALE_S."""
    for marked in own.root.parent.glob(f"*{MARK}"):
        folder = marked.with_suffix("")
        with contextlib.suppress(OSError):
            changed = max(path.stat().st_mtime for path in (marked, folder) if path.exists())
            if folder != own.root and not folder.is_symlink() and time.time() - changed > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
                marked.unlink(missing_ok=True)


def _mark_of(root: Path) -> Path:
    return root.with_name(root.name + MARK)

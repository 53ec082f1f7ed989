"""Folder of one start on this machine: it holds the socket of the start's store."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from everstep.security.ownership import other_reader

FOLDERS = "everstep-start-"
SOCKET, LOCK = "store", "lock"
UNLOCKED_S = 3600.0
"""Age at which a folder without a lock is left over, not one that is being made."""


class StartFolder:
    """A folder that only this user can enter; those of processes that were killed are removed.

    It is removed by `close`, at the latest when this process ends. This process holds a lock on a file in it, which the
    kernel releases even after a kill.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{FOLDERS}*"):
            _remove_if_left(left)
        self.path = tempfile.mkdtemp(prefix=FOLDERS)  # mode 0700
        atexit.register(self.close)
        self._lock = os.open(f"{self.path}/{LOCK}.new", os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # A file of this name is locked as long as its process lives.
        os.rename(f"{self.path}/{LOCK}.new", f"{self.path}/{LOCK}")

    @property
    def store(self) -> str:
        """Address of the store in this folder."""
        return f"unix:{self.path}/{SOCKET}"

    def close(self) -> None:
        """Remove the folder."""
        atexit.unregister(self.close)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user that no process holds any more."""
    with contextlib.suppress(OSError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or other_reader(found):
            return
        if not (folder / LOCK).exists():
            if time.time() - found.st_mtime > UNLOCKED_S:  # its owner was killed before it could lock it
                shutil.rmtree(folder, ignore_errors=True)
            return
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)

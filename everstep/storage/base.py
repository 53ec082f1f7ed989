"""Protocol of all storage back ends, and the check that a store creates a file only once."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import IO, Protocol

from everstep.errors import StorageError

STAGED = ".staged"
"""Ending of hidden names of files being written; `names` does not list them."""


Buffer = bytes | memoryview
"""Read-only bytes."""


class Storage(Protocol):
    """Files below one root. Paths are relative, with '/'; a missing file is FileNotFoundError.

    Commits rely on this: `create` succeeds for exactly one of many writers, `write` is atomic, and on a local disk both
    are durable when they return.
    """

    url: str

    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, start: int, stop: int) -> Buffer:
        """Return bytes [start, stop), fewer at the end of the file."""
        ...

    def size(self, path: str) -> int: ...
    def write(self, path: str, data: bytes) -> None:
        """Replace the file atomically: a reader sees the old bytes or the new ones."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Create the file; False when it exists already. Exactly one of many writers succeeds."""
        ...

    def writer(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a stream into a file that appears atomically (and durable on a local disk) when the block ends.

        After an error or a kill, the earlier content remains.
        """
        ...

    def names(self, path: str = "") -> list[str]:
        """Return sorted names directly below a folder; empty when there is no such folder."""
        ...

    def exists(self, path: str) -> bool: ...
    def delete(self, path: str) -> None:
        """Remove a file, or a folder with its content; do nothing when it is missing."""
        ...

    def copy(self, path: str, to: str) -> None:
        """Copy a file, which appears atomically, or a folder with its content, which appears file by file."""
        ...

    def move(self, path: str, to: str) -> None:
        """Rename a file or folder. On an object store this copies and deletes, so it is no commit."""
        ...

    def path(self, path: str = "") -> Path | None:
        """Return the local path; None when the root is not on a local disk."""
        ...


def probe(storage: Storage) -> None:
    """Write a new name twice create-only; StorageError unless only the first write succeeds.

    A local disk is not checked: the file system refuses the second link.
    """
    if storage.path() is not None:
        return
    name = f".probe-{uuid.uuid4().hex}"
    first, second = f"first {name}".encode(), f"second {name}".encode()
    try:
        created = storage.create(name, first), storage.create(name, second)
        kept = storage.read(name)
    except FileNotFoundError as error:
        raise StorageError(f"{storage.url} does not show what was just written to it ({error})") from error
    storage.delete(name)
    if created != (True, False) or kept != first:
        raise StorageError(
            f"{storage.url} lets a second writer overwrite what a first one has created (it ignores preconditions); "
            "two starts of a run could destroy each other's checkpoints there: use another store or a disk for run_root"
        )


def is_kept(storage: Storage, path: str, data: bytes) -> bool:
    """True if a file that was just written can be read back."""
    try:
        return storage.read(path) == data
    except FileNotFoundError:
        return False

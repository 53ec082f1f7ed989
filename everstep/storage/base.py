"""Protocol of all storage back ends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, Protocol

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

"""What a storage can do, whatever it lies on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, Protocol

STAGED = ".staged"
"""Ending of the hidden names under which a file grows; `names` does not list them."""


Buffer = bytes | memoryview
"""Bytes that are only read."""


class Storage(Protocol):
    """Files below one root. Paths are relative, with '/'; a missing file is FileNotFoundError.

    What a commit rests on: `create` succeeds for exactly one of many writers, `write` is seen whole or not at all,
    and on a local disk both are durable when they return.
    """

    url: str

    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, start: int, stop: int) -> Buffer:
        """Bytes [start, stop), or as many of them as there are."""
        ...

    def size(self, path: str) -> int: ...
    def write(self, path: str, data: bytes) -> None:
        """Replace the file as a whole: a reader sees the old bytes or the new ones."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write the file if there is none; False when there is one already. One of many writers wins."""
        ...

    def writer(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A stream into a file that appears whole (and durable on a local disk) when the block ends.

        When the block is left by an error, or by a kill, whatever was there before still is.
        """
        ...

    def names(self, path: str = "") -> list[str]:
        """Sorted names directly below a folder; empty when there is no such folder."""
        ...

    def exists(self, path: str) -> bool: ...
    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all in it; nothing happens when there is none."""
        ...

    def copy(self, path: str, to: str) -> None:
        """Copy a file, which appears whole, or a folder with all in it, which appears file by file."""
        ...

    def move(self, path: str, to: str) -> None:
        """Rename a file or folder; on an object store this is a copy and a delete, so never a commit."""
        ...

    def path(self, path: str = "") -> Path | None:
        """The local path, or None when the root is not on a local disk."""
        ...

"""Protocol of all storage back ends, and the check that a store creates a file only once."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from everstep.errors import StorageError

STAGED = ".staged"
"""Ending of hidden names of files being written; `names` does not list them."""


Buffer = bytes | memoryview
"""Read-only bytes."""
LARGEST_READ = 1 << 30
"""Bytes of a file that is read whole.

A local one with holes costs its author no disk, and its reader memory; one in a store may belong to another user.
"""
BLOCK_BYTES = 4 << 20
LONGEST_LINE = 1 << 20
"""Bytes of a record in a file of JSON lines; a longer one is left out."""


class Storage(Protocol):
    """Files below one root. Paths are relative, with '/'; a missing file is FileNotFoundError.

    Commits rely on this: `create` succeeds for exactly one of many writers, `write` is atomic, and on a local disk both
    are durable when they return.
    """

    url: str

    def read(self, path: str) -> bytes:
        """Return the whole content; StorageError if it has more than LARGEST_READ bytes."""
        ...

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


def read_limited(storage: Storage, path: str, most: int) -> bytes:
    """Return the content of a file; ValueError if it has more than `most` bytes."""
    if storage.path() is None:  # one request instead of two
        data = bytes(storage.read_range(path, 0, most + 1))
        if len(data) > most:
            raise ValueError(f"{path} has more than {most} bytes (limit)")
        return data
    if (size := storage.size(path)) > most:
        raise ValueError(f"{path} has {size} bytes (limit {most})")
    return storage.read(path)


def too_large(url: str, path: str, size: str) -> StorageError:
    """Return the error for a file that is too large to be read whole."""
    refused = StorageError(f"cannot read {url}/{path}: it has {size} bytes (limit {LARGEST_READ}); see who wrote it")
    refused.passing = False
    return refused


def blocks(storage: Storage, path: str, start: int = 0) -> Iterator[Buffer]:
    """Yield the content of a file from `start` to its present end, without holding all of it."""
    end = storage.size(path)
    while start < end and (block := storage.read_range(path, start, min(end, start + BLOCK_BYTES))):
        yield block
        start += len(block)


def lines(storage: Storage, path: str) -> Iterator[bytes]:
    """Yield the lines of a file, without those longer than LONGEST_LINE."""
    rest, too_long = b"", False
    for block in blocks(storage, path):
        *whole, rest = (rest + bytes(block)).split(b"\n")
        for line in whole:
            if not too_long and len(line) <= LONGEST_LINE:
                yield line
            too_long = False
        if too_long or len(rest) > LONGEST_LINE:
            rest, too_long = b"", True
    if rest and not too_long:
        yield rest


def start_of_last(storage: Storage, path: str, count: int) -> int:
    """Return the offset of the last `count` lines of a file, which is read backwards from its end."""
    end = start = storage.size(path)
    if count < 1 or not end:
        return end
    left = count + (storage.read_range(path, end - 1, end) == b"\n")  # a line break at the end begins no line
    while start > 0 and (block := bytes(storage.read_range(path, max(0, start - BLOCK_BYTES), start))):
        at = len(block)
        while left and (at := block.rfind(b"\n", 0, at)) >= 0:
            left -= 1
        if not left:
            return start - len(block) + at + 1
        start -= len(block)
    return 0


def is_kept(storage: Storage, path: str, data: bytes) -> bool:
    """True if a file that was just written can be read back."""
    try:
        return storage.read(path) == data
    except FileNotFoundError:
        return False

"""Check that a store honours create-only writes, on which commits rely, before a run begins."""

from __future__ import annotations

import uuid

from everstep.errors import StorageError
from everstep.storage.base import Storage


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

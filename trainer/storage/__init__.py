"""A handful of verbs on files below a URL: local folders by the operating system, stores by obstore or fsspec.

Nothing but the standard library is imported before a remote URL is used.
"""

from __future__ import annotations

from trainer.storage.by_fsspec import FsspecStorage, filesystem
from trainer.storage.by_obstore import ObstoreStorage, serves
from trainer.storage.local import LocalStorage
from trainer.storage.patience import retry
from trainer.storage.port import STAGED, Storage
from trainer.storage.probe import probe

__all__ = [
    "STAGED",
    "FsspecStorage",
    "LocalStorage",
    "ObstoreStorage",
    "Storage",
    "filesystem",
    "join_url",
    "open_storage",
    "probe",
    "retry",
]


def open_storage(url: str) -> Storage:
    """The storage for a path or a URL (`file://` and plain paths are local)."""
    if "://" not in url or url.startswith("file://"):
        return LocalStorage(url.removeprefix("file://"))
    return ObstoreStorage(url) if serves(url) else FsspecStorage(url)


def join_url(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])

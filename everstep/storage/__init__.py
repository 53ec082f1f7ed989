"""File operations below a URL: local folders by the operating system, stores by obstore or fsspec.

Modules for remote URLs are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy
from everstep.storage.base import STAGED, Buffer, Storage, probe
from everstep.storage.local import LocalStorage

if TYPE_CHECKING:
    from everstep.storage.fsspec_backend import FsspecStorage, filesystem
    from everstep.storage.obstore_backend import ObstoreStorage
    from everstep.storage.retries import retry

__all__ = [
    "STAGED",
    "Buffer",
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

__getattr__ = lazy(
    __name__,
    {
        "FsspecStorage": "everstep.storage.fsspec_backend",
        "ObstoreStorage": "everstep.storage.obstore_backend",
        "filesystem": "everstep.storage.fsspec_backend",
        "retry": "everstep.storage.retries",
    },
)
"""Imported on first use, so a run on local disks imports none of them."""


def open_storage(url: str) -> Storage:
    """Return the storage for a path or a URL (`file://` and plain paths are local)."""
    if "://" not in url or url.startswith("file://"):
        return LocalStorage(url.removeprefix("file://"))
    from everstep.storage.fsspec_backend import FsspecStorage
    from everstep.storage.obstore_backend import ObstoreStorage, serves

    return ObstoreStorage(url) if serves(url) else FsspecStorage(url)


def join_url(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])

"""A handful of verbs on files below a URL: local folders by the operating system, stores by obstore or fsspec.

Nothing is imported for remote URLs before one is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from everstep.storage.local import LocalStorage
from everstep.storage.base import STAGED, Buffer, Storage
from everstep.storage.conditional_write_check import probe

if TYPE_CHECKING:
    from everstep.storage.fsspec_backend import FsspecStorage, filesystem
    from everstep.storage.obstore_backend import ObstoreStorage
    from everstep.storage.retry import retry

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

REMOTE = {
    "FsspecStorage": "by_fsspec",
    "ObstoreStorage": "by_obstore",
    "filesystem": "by_fsspec",
    "retry": "patience",
}
"""Names that are imported when they are asked for → module. A run on this machine's disks asks for none."""


def __getattr__(name: str) -> Any:
    if name not in REMOTE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{REMOTE[name]}"), name)


def open_storage(url: str) -> Storage:
    """The storage for a path or a URL (`file://` and plain paths are local)."""
    if "://" not in url or url.startswith("file://"):
        return LocalStorage(url.removeprefix("file://"))
    from everstep.storage.fsspec_backend import FsspecStorage
    from everstep.storage.obstore_backend import ObstoreStorage, serves

    return ObstoreStorage(url) if serves(url) else FsspecStorage(url)


def join_url(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])

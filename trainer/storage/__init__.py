"""A handful of verbs on files below a URL: local folders by the operating system, stores by obstore or fsspec.

Nothing is imported for remote URLs before one is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainer.storage.local import LocalStorage
from trainer.storage.port import STAGED, Buffer, Storage
from trainer.storage.probe import probe

if TYPE_CHECKING:
    from trainer.storage.by_fsspec import FsspecStorage, filesystem
    from trainer.storage.by_obstore import ObstoreStorage
    from trainer.storage.patience import retry

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
    from trainer.storage.by_fsspec import FsspecStorage
    from trainer.storage.by_obstore import ObstoreStorage, serves

    return ObstoreStorage(url) if serves(url) else FsspecStorage(url)


def join_url(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])

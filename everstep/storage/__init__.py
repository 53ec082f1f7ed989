"""File operations below a URL: local folders by the operating system, stores by obstore or fsspec.

Modules for remote URLs are imported on first use.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from everstep.errors import ConfigError
from everstep.lazy_names import lazy
from everstep.security.secret_detection import without_secrets
from everstep.storage.base import STAGED, Buffer, Storage, blocks, lines, probe, read_limited, start_of_last
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
    "blocks",
    "filesystem",
    "join_url",
    "lines",
    "open_storage",
    "probe",
    "read_limited",
    "retry",
    "start_of_last",
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


SCHEMES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory")
"""Schemes of a URL. fsspec has many more: some query any host, some run code that a file names."""
CREDENTIALS = re.compile(r"[^/]*://[^/]*:[^/]*@")
MORE_SCHEMES = "EVERSTEP_SCHEMES"
"""Environment variable: further schemes of fsspec, such as hdfs,lakefs."""


def open_storage(url: str) -> Storage:
    """Return the storage for a path or a URL (`file://` and plain paths are local).

    Raises:
        ConfigError: the URL has a scheme that is not in SCHEMES, or chains several of them.
    """
    if "://" not in url and "::" not in url:
        return LocalStorage(url)
    scheme = url.partition("://")[0]
    if "::" in scheme or scheme not in (*SCHEMES, *os.environ.get(MORE_SCHEMES, "").split(",")):
        raise ConfigError(
            f"{without_secrets(url)!r}: the scheme {scheme!r} is not one of {', '.join(SCHEMES)}; if you want it all "
            f"the same, set {MORE_SCHEMES}={scheme.rpartition('::')[2]}"
        )
    if CREDENTIALS.match(url):
        raise ConfigError(
            f"{scheme}://…: the URL holds a password, which logs and records would show; put it in the environment"
        )
    if scheme == "file":
        return LocalStorage(url.removeprefix("file://"))
    from everstep.storage.fsspec_backend import FsspecStorage
    from everstep.storage.obstore_backend import ObstoreStorage, serves

    return ObstoreStorage(url) if serves(url) else FsspecStorage(url)


def join_url(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])

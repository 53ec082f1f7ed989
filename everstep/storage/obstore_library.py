"""obstore: its clients of one store, and its native library, loaded again in a forked process."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from everstep.errors import StorageError
from everstep.storage import credentials, gcs_credentials
from everstep.storage import obstore_library as obstore_fork
from everstep.storage.retries import CONNECT_S, LONGEST_DELAY_S, QUIET_S, SEND_S, deadline_s

READ_S = 3600.0
"""Timeout of one read while bytes still arrive."""


@dataclass(frozen=True)
class Clients:
    """Clients of one store in one process: one for each kind of request, as timeouts are set per client."""

    lib: ModuleType
    quick: Any
    """For quick requests: head, list, small files."""
    reading: Any
    """For downloads: given up when no more bytes arrive."""
    sending: Any
    """For uploads in parts; it retries single parts by itself."""


def connect(url: str) -> Clients:
    """Return clients for a URL.

    Forms: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, abfs://container@account.host/prefix.
    """
    lib = obstore_fork.obstore()
    parts = urlsplit(url)
    kind, words = STORES[parts.scheme]
    opened = words(url)
    store = partial(getattr(lib.store, kind), parts.netloc.partition("@")[0], prefix=parts.path.strip("/") or None)
    at = str(opened["config"].get("endpoint") or opened["config"].get("base_url"))
    http = {"allow_http": True} if at.startswith("http://") else {}
    once = {"max_retries": 0, "retry_timeout": _seconds(1)}
    again = {
        "max_retries": 100,  # the limit is retry_timeout
        "retry_timeout": _seconds(deadline_s()),
        "backoff": {"init_backoff": _seconds(0.2), "max_backoff": _seconds(LONGEST_DELAY_S), "base": 2},
    }

    def client(retries: dict[str, Any], **timeouts: float) -> Any:
        waits = {name: _seconds(value) for name, value in timeouts.items()}
        options = {**http, "connect_timeout": _seconds(CONNECT_S), **waits}
        return store(client_options=options, retry_config=retries, **opened)

    try:
        return Clients(
            lib,
            quick=client(once, timeout=CONNECT_S + QUIET_S),
            reading=client(once, timeout=READ_S, read_timeout=QUIET_S),
            sending=client(again, timeout=SEND_S),
        )
    except (lib.exceptions.BaseError, ValueError) as error:
        raise StorageError(f"cannot open {url}: {str(error).splitlines()[0]}") from error


def _s3(url: str) -> dict[str, Any]:
    """Return the config of S3; obstore reads the other AWS variables itself, but no profile file."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    opened = {"config": {"region": region, **({"endpoint": endpoint} if endpoint else {})}}
    profile = credentials.s3_profile(url)
    return opened if profile is None else {**opened, "credential_provider": partial(credentials.s3_keys, profile)}


def _azure(url: str) -> dict[str, Any]:
    host = urlsplit(url).netloc.partition("@")[2]
    return {"config": dict(credentials.azure(url, host.split(".", 1)[0] or None))}


def _google(url: str) -> dict[str, Any]:
    opened = gcs_credentials.for_obstore(url)
    at = gcs_credentials.endpoint()
    return {**opened, "config": {**opened["config"], "base_url": at}} if at else opened


STORES = {
    "s3": ("S3Store", _s3),
    "s3a": ("S3Store", _s3),
    "gs": ("GCSStore", _google),
    "gcs": ("GCSStore", _google),
    "az": ("AzureStore", _azure),
    "abfs": ("AzureStore", _azure),
    "abfss": ("AzureStore", _azure),
}
"""Scheme of a URL → obstore's class, and the function that returns its endpoint and credentials."""


def _seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


_NATIVE = "obstore._obstore"
_inherited: list[Any] = []
"""Modules and clients of parent processes. Never released: a release could wait for lost threads."""
_stale = False
_loading = threading.Lock()


def _note_fork() -> None:
    global _stale, _loading
    _stale = _stale or _NATIVE in sys.modules
    _loading = threading.Lock()  # the old lock may be held by a thread that the fork did not copy


os.register_at_fork(after_in_child=_note_fork)


def obstore() -> ModuleType:
    """Return the package `obstore`, usable in this process; StorageError if a reload after a fork fails."""
    global _stale
    with _loading:
        if _stale:
            _load_again()
            _stale = False
        import obstore

        return obstore


def keep_for_ever(client: Any) -> None:
    """Keep a client from before a fork alive for the life of the process."""
    _inherited.append(client)


def _load_again() -> None:
    old = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "obstore"}
    _inherited.append(old)
    for name in old:
        del sys.modules[name]
    try:
        sys.modules[_NATIVE] = _image(str(old[_NATIVE].__file__))
    except (OSError, ImportError, AttributeError) as error:
        raise StorageError(
            f"cannot load obstore in a forked process ({error}); set EVERSTEP_OBSTORE=0 to go by fsspec"
        ) from error


def _image(file: str) -> ModuleType:
    memory = os.memfd_create("obstore")
    try:
        with open(file, "rb") as source, open(memory, "wb", closefd=False) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        path = f"/proc/self/fd/{memory}"
        loader = importlib.machinery.ExtensionFileLoader(_NATIVE, path)
        spec = importlib.util.spec_from_file_location(_NATIVE, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.__file__ = file  # so that a child of this child finds it
        return module
    finally:
        os.close(memory)

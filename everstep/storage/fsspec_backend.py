"""Storage back end for any store that fsspec supports."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from everstep.errors import StorageError
from everstep.storage import credentials, gcs_credentials
from everstep.storage.base import LARGEST_READ, STAGED, too_large
from everstep.storage.retries import (
    CONNECT_S,
    PARALLEL_PARTS,
    PART_BYTES,
    QUIET_S,
    SEND_S,
    has_won,
    is_beyond_the_end,
    one_line,
    retry,
)
from everstep.storage.s3_multipart import send_in_parts
from everstep.storage.upload_stream import Part, uploading

T = TypeVar("T")
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl")
"""Protocols whose files appear when their upload is complete, and not at all when it is aborted."""
CONNECTIONS = 32
"""Connections of one process to one store; with s3fs's default of 10, the 11th thread would wait."""
QUICK_S = CONNECT_S + QUIET_S
"""Timeout of one request with a short response."""
SHARED_TRIES = 6
"""Attempts of a shared client, which retries by itself because other code reads its files as streams."""


class FsspecStorage:
    """A prefix on any store that fsspec supports; transient faults are retried with full-jitter back-off."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._protocol = url.split(":", 1)[0]
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[type[FsspecStorage], tuple[str]]:
        return type(self), (self.url,)  # clients are not pickled

    def path(self, path: str = "") -> None:
        return None

    @property
    def _fs(self) -> Any:
        return self._open()[0]

    def _open(self) -> tuple[Any, str]:
        # Clients of async stores do not survive a fork, so each process opens its own.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *filesystem(self.url))
        return self._opened[1], self._opened[2]

    def _at(self, path: str) -> str:
        return f"{self._open()[1]}/{path}".rstrip("/")

    def _ask(self, verb: str, *args: Any, within_s: float | None = None, **options: Any) -> Any:
        """Call a method of the client with retries; `within_s` limits the seconds of each attempt."""
        return self._try(lambda: self._once(verb, *args, within_s=within_s, **options))

    def _once(self, verb: str, *args: Any, within_s: float | None, **options: Any) -> Any:
        fs = self._fs
        limit = {"timeout": within_s} if within_s and getattr(fs, "async_impl", False) else {}
        return getattr(fs, verb)(*args, **options, **limit)

    def _try(self, work: Callable[[], T]) -> T:
        return retry(work, self.url)

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """Report a FileNotFoundError on a write as a missing bucket."""
        try:
            yield
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {self.url}: there is no such bucket ({error})") from error

    def read(self, path: str) -> bytes:
        data = self.read_range(path, 0, LARGEST_READ + 1)
        if len(data) > LARGEST_READ:
            raise too_large(self.url, path, f"more than {LARGEST_READ}")
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        if start >= stop:  # HTTP has no empty range: s3fs would give the whole file
            return b""

        def once() -> bytes:
            try:
                data: bytes = self._fs.cat_file(self._at(path), start=start, end=stop)
            except Exception as error:
                if not is_beyond_the_end(error):
                    raise
                return b""
            return data

        return self._try(once)

    def size(self, path: str) -> int:
        return int(self._ask("info", self._at(path), within_s=QUICK_S)["size"])

    def write(self, path: str, data: bytes) -> None:
        with self._there():
            self._ask("pipe_file", self._at(path), data, within_s=_send_s(len(data)))

    def create(self, path: str, data: bytes) -> bool:
        def once() -> bool:
            try:
                self._once("pipe_file", self._at(path), data, mode="create", within_s=_send_s(len(data)))
            except FileExistsError:
                return has_won(lambda: self.read(path), data)
            return True

        with self._there():
            won = self._try(once)
        self._forget(path)
        return won

    def writer(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return uploading(lambda data: self._send(path, data), PART_BYTES)

    def _send(self, path: str, data: bytes | Iterator[Part]) -> None:
        if self._protocol in OBJECT_STORES:
            if isinstance(data, bytes):
                self.write(path, data)
            else:
                self._stream(path, data)
        else:
            staged = f"{path}.{uuid.uuid4().hex}{STAGED}"
            self._stream(staged, iter([data]) if isinstance(data, bytes) else data)
            self.move(staged, path)
        self._forget(path)

    def _stream(self, path: str, parts: Iterator[Part]) -> None:
        with self._there(), one_line(self.url):
            if self._protocol in ("s3", "s3a"):
                send_in_parts(functools.partial(self._ask_s3, path), parts)
            else:
                self._write_file(path, parts)

    def _ask_s3(self, path: str, method: str, **words: Any) -> dict[str, Any]:
        """Call a method of S3 for one file."""
        bucket, _, key = self._at(path).partition("/")
        limit_s = _send_s(PARALLEL_PARTS * len(words.get("Body", b"")))
        answer: dict[str, Any] = self._ask("call_s3", method, Bucket=bucket, Key=key, within_s=limit_s, **words)
        return answer

    def _write_file(self, path: str, parts: Iterator[Part]) -> None:
        """Write through a file of the client, which uploads it in parts if it can."""
        file = self._fs.open(self._at(path), "wb", block_size=PART_BYTES)
        try:
            for part in parts:
                file.write(part)
        except BaseException:
            self._break_off(file, None if self._protocol in OBJECT_STORES else path)
            raise
        file.close()

    def _break_off(self, file: Any, staged: str | None) -> None:
        """Discard the written bytes; closing the stream as usual would publish them."""
        with contextlib.suppress(Exception):
            file.discard()
        with contextlib.suppress(AttributeError):
            file.closed = True
        if staged is not None:
            with contextlib.suppress(StorageError):
                self.delete(staged)

    def names(self, path: str = "") -> list[str]:
        self._forget(path)
        try:
            found = self._ask("ls", self._at(path), detail=False, refresh=True, within_s=SEND_S)
        except FileNotFoundError:
            return []
        inside = {str(name).rstrip("/") for name in found} - {self._at(path)}
        return sorted(name.rsplit("/", 1)[-1] for name in inside if not name.endswith(STAGED))

    def exists(self, path: str) -> bool:
        self._forget(path)
        return bool(self._ask("exists", self._at(path), within_s=QUICK_S))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm", self._at(path), recursive=True, within_s=SEND_S)
        self._forget(path)

    def copy(self, path: str, to: str) -> None:
        self._forget(path)
        source, target = self._at(path), self._at(to)
        found = self._ask("find", source, within_s=SEND_S)
        if not found:
            raise FileNotFoundError(f"{self.url}/{path}")
        for file in found:
            goal = f"{target}{str(file).removeprefix(source)}"
            self._ask("cp_file", file, goal, within_s=SEND_S)
        self._forget(to)

    def move(self, path: str, to: str) -> None:
        self.copy(path, to)
        self.delete(path)

    def _forget(self, path: str) -> None:
        """Drop fsspec's cache of listings: other processes write to this folder too."""
        self._fs.invalidate_cache()


def filesystem(url: str, *, shared: bool = False) -> tuple[Any, str]:
    """Return a client with our deadlines and the environment's credentials, and its path for a URL.

    A shared client is made once per process and retries by itself. StorageError when the client cannot be made.
    """
    protocol = url.split(":", 1)[0]
    alone = protocol in OBJECT_STORES and not shared
    try:
        import fsspec

        with one_line(url):
            options = _options(url, protocol, SHARED_TRIES if shared else 1)
            # fsspec would cache the client for the life of the process, even when the environment changes.
            fs, root = fsspec.url_to_fs(url, **options, skip_instance_cache=alone)
    except (ImportError, ValueError) as error:
        raise StorageError(f"cannot open {url}: {error}") from error
    if alone:
        fs.retries = 1  # s3fs's own retries, around those of botocore
    return fs, root


def _send_s(count: int) -> float:
    """Return the seconds allowed for sending so many bytes over a slow line."""
    return max(QUICK_S, SEND_S * count / (PARALLEL_PARTS * PART_BYTES))


def _options(url: str, protocol: str, tries: int) -> dict[str, Any]:
    """Return deadlines and credentials, in the terms of the protocol's client."""
    if credentials.told_to_fsspec(protocol):
        return {}
    if protocol in ("s3", "s3a"):
        return _s3(url, tries)
    if protocol in ("gs", "gcs"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=QUIET_S)
        return {"token": gcs_credentials.for_gcsfs(url), "requests_timeout": timeout}
    if protocol in ("az", "abfs", "abfss"):
        return _azure(url)
    return {}


def _s3(url: str, tries: int) -> dict[str, Any]:
    credentials.s3_profile(url)  # botocore finds the credentials by itself
    config = {
        "connect_timeout": CONNECT_S,
        "read_timeout": QUIET_S,
        "max_pool_connections": CONNECTIONS,
        "retries": {"mode": "standard", "total_max_attempts": tries},
        "connector_args": {"socket_factory": _impatient_socket},
    }
    options = {"config_kwargs": config, "default_block_size": PART_BYTES, "max_concurrency": PARALLEL_PARTS}
    return {**options, "anon": True} if credentials.anonymous("AWS") else options


def _impatient_socket(address: Any) -> socket.socket:
    """Return a socket that times out when its peer stops receiving, which aiohttp's timeouts do not cover."""
    made = socket.socket(address[0], address[1], address[2])
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(QUIET_S * 1000))
    return made


def _azure(url: str) -> dict[str, Any]:
    account = url.split("@", 1)[1].split(".", 1)[0] if "@" in url else None
    found = credentials.azure(url, account)
    options: dict[str, Any] = {"connection_timeout": CONNECT_S, "read_timeout": QUIET_S}
    if os.environ.get("AZURE_STORAGE_CONNECTION_STRING"):
        return {**options, "connection_string": os.environ["AZURE_STORAGE_CONNECTION_STRING"]}
    if "federated_token_file" in found:
        from azure.identity.aio import WorkloadIdentityCredential

        return {**options, "account_name": found["account_name"], "credential": WorkloadIdentityCredential()}
    if credentials.anonymous("AZURE"):
        return {**options, **found, "anon": True}
    words = {"sas_key": "sas_token"}
    named = {words.get(name, name): value for name, value in found.items()}
    return {**options, **named, "anon": False}

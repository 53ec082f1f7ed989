"""Storage back end for S3, Google's store and Azure, by obstore's native calls.

An upload takes about half of s3fs's CPU time per byte. obstore's fsspec interface is not used: it overwrites files in
create-only mode.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar, cast

from everstep.errors import StorageError
from everstep.storage import credentials, gcs_credentials
from everstep.storage import obstore_library as obstore_clients
from everstep.storage import obstore_library as obstore_fork
from everstep.storage.base import LARGEST_READ, STAGED, Buffer, too_large
from everstep.storage.obstore_library import Clients
from everstep.storage.retries import PARALLEL_PARTS, PART_BYTES, has_won, is_beyond_the_end, one_line, retry
from everstep.storage.upload_stream import Part, uploading

T = TypeVar("T")
SWITCH = "EVERSTEP_OBSTORE"
"""Environment variable; 0 selects fsspec although obstore is installed."""
SMALL_BYTES = 1 << 20
"""Largest size, in bytes, that is sent within the timeout of a quick request."""
GOOGLE = ("gs://", "gcs://")
MARK = "everstep-upload"
"""Metadata key of files that are uploaded to Google's store in parts.

When the response to the end of an upload is lost, the request is repeated. S3 confirms it; Google's store reports an
unknown upload, and the mark tells if the file is from this upload.
"""
COPY_LIMIT = 5 * 10**9
"""Largest file that S3 copies in one request, in bytes."""


def serves(url: str) -> bool:
    """True if obstore opens a URL: it is installed, supports the store, and fsspec has no settings for it."""
    protocol = url.split(":", 1)[0]
    if os.environ.get(SWITCH) == "0" or importlib.util.find_spec("obstore") is None:
        return False
    if credentials.told_to_fsspec(protocol):
        return False
    if protocol in ("s3", "s3a"):
        # Without a region obstore uses a wrong endpoint of Amazon's; botocore is redirected to the right one.
        named = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
        return any(os.environ.get(name) for name in named) or importlib.util.find_spec("s3fs") is None
    if protocol in ("gs", "gcs"):
        return not gcs_credentials.others() or importlib.util.find_spec("gcsfs") is None
    return protocol in ("az", "abfs", "abfss")


class ObstoreStorage:
    """A prefix in a bucket or container; transient faults are retried with full-jitter back-off."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[int, Clients] | None = None

    def __reduce__(self) -> tuple[type[ObstoreStorage], tuple[str]]:
        return type(self), (self.url,)  # clients are not pickled

    def path(self, path: str = "") -> None:
        return None

    @property
    def _clients(self) -> Clients:
        if self._opened is None or self._opened[0] != os.getpid():
            if self._opened is not None:
                obstore_fork.keep_for_ever(self._opened)
            self._opened = (os.getpid(), obstore_clients.connect(self.url))
        return self._opened[1]

    def _try(self, work: Callable[[Clients], T]) -> T:
        return retry(lambda: work(self._clients), self.url)

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """Report a FileNotFoundError on a write as a missing bucket."""
        try:
            yield
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {self.url}: there is no such bucket") from error

    def read(self, path: str) -> bytes:
        def once(to: Clients) -> bytes:
            found = to.lib.get(to.reading, path)
            if (size := int(found.meta["size"])) > LARGEST_READ:
                raise too_large(self.url, path, str(size))
            return bytes(found.bytes())

        return self._try(once)

    def read_range(self, path: str, start: int, stop: int) -> Buffer:
        if start >= stop:  # HTTP has no empty range
            return b""

        def once(to: Clients) -> Buffer:
            try:
                # A view instead of a copy, which would take a third of the transfer time.
                return memoryview(to.lib.get_range(to.reading, path, start=start, end=stop))
            except to.lib.exceptions.BaseError as error:
                if not is_beyond_the_end(error):
                    raise
                return b""

        return self._try(once)

    def size(self, path: str) -> int:
        return int(self._try(lambda to: to.lib.head(to.quick, path))["size"])

    def write(self, path: str, data: bytes) -> None:
        self._put(path, data)

    def _put(self, path: str, data: bytes | Iterator[Part]) -> None:
        """Upload data. Bytes are sent again after a fault; of an iterator, the client repeats single parts."""
        with self._there():
            if isinstance(data, bytes):
                self._try(lambda to: self._send(to, path, data))
            else:
                with one_line(self.url):
                    self._send(self._clients, path, data)

    def _send(self, to: Clients, path: str, data: bytes | Iterator[Part]) -> None:
        small = isinstance(data, bytes) and len(data) <= SMALL_BYTES
        client, parts = (to.quick, False) if small else (to.sending, None if isinstance(data, bytes) else True)
        mark = uuid.uuid4().hex
        marked = {"attributes": {MARK: mark}} if self.url.startswith(GOOGLE) and not small else {}
        how = {"use_multipart": parts, "chunk_size": PART_BYTES, "max_concurrency": PARALLEL_PARTS, **marked}
        try:
            to.lib.put(client, path, data, **how)
        except FileNotFoundError as error:
            if "NoSuchUpload" not in str(error):
                raise
            if not marked or self._mark(path) != mark:
                raise ConnectionError("the store has lost what was sent") from error

    def _mark(self, path: str) -> str | None:
        """Return the mark of the present file; None without a file."""
        try:
            found = self._try(lambda to: to.lib.get(to.quick, path, options={"head": True}).attributes)
        except FileNotFoundError:
            return None
        return cast(str | None, found.get(MARK))

    def create(self, path: str, data: bytes) -> bool:
        def once(to: Clients) -> bool:
            client = to.quick if len(data) <= SMALL_BYTES else to.sending
            try:
                # A single request: some stores drop the condition of a multipart upload.
                to.lib.put(client, path, data, mode="create", use_multipart=False)
            except to.lib.exceptions.AlreadyExistsError:
                return has_won(lambda: self.read(path), data)
            return True

        with self._there():
            return self._try(once)

    def writer(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return uploading(lambda data: self._put(path, data), PART_BYTES)

    def names(self, path: str = "") -> list[str]:
        try:
            found = self._try(lambda to: to.lib.list_with_delimiter(to.quick, path or None))
        except FileNotFoundError:
            return []
        inside = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        names = {str(name).rstrip("/").rsplit("/", 1)[-1] for name in inside}
        return sorted(name for name in names if not name.endswith(STAGED))

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return bool(self._below(path))
        return True

    def _below(self, path: str) -> list[dict[str, Any]]:
        """Return all files in a folder."""
        try:
            found = self._try(lambda to: [one for part in to.lib.list(to.quick, path or None) for one in part])
        except FileNotFoundError:
            return []
        return cast(list[dict[str, Any]], found)

    def delete(self, path: str) -> None:
        def once(to: Clients) -> None:
            inside = [str(one["path"]) for one in self._below(path)]
            try:
                if inside:
                    to.lib.delete(to.quick, inside)
            except FileNotFoundError:  # from Google's store, when a file was deleted meanwhile; others may be left
                raise ConnectionError("files went away while they were deleted") from None

        self._try(once)
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda to: to.lib.delete(to.quick, path))

    def copy(self, path: str, to: str) -> None:
        found = {str(one["path"]): int(one["size"]) for one in self._below(path)}
        with contextlib.suppress(FileNotFoundError):
            found[path] = self.size(path)
        if not found:
            raise FileNotFoundError(f"{self.url}/{path}")
        for file, size in found.items():
            self._copy_file(file, f"{to}{file.removeprefix(path)}", size)

    def _copy_file(self, file: str, to: str, size: int) -> None:
        if size <= COPY_LIMIT:
            self._try(lambda at: at.lib.copy(at.sending, file, to))
            return
        with self.writer(to) as stream:
            for start in range(0, size, PART_BYTES):
                stream.write(self.read_range(file, start, min(start + PART_BYTES, size)))

    def move(self, path: str, to: str) -> None:
        self.copy(path, to)
        self.delete(path)

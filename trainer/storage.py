"""A handful of verbs on files below a URL: local folders by the operating system, all else by fsspec.

What the commit rests on: `create` succeeds for exactly one of many writers, `write` is seen whole or not at all,
and on a local disk both are durable when they return.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from trainer.errors import StorageError

T = TypeVar("T")
ATTEMPTS = 6
FIRST_DELAY_S = 0.2
STAGED = ".staged"
"""Ending of the hidden names under which a file grows; `names` does not list them."""
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl")
"""Protocols whose files appear when their upload is complete, and not at all when it is broken off."""


class Storage(Protocol):
    """Files below one root. Paths are relative, with '/'; a missing file is FileNotFoundError."""

    url: str

    def read(self, path: str) -> bytes: ...
    def read_range(self, path: str, start: int, stop: int) -> bytes: ...
    def size(self, path: str) -> int: ...
    def write(self, path: str, data: bytes) -> None:
        """Replace the file as a whole: a reader sees the old bytes or the new ones."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Write the file if there is none; False when there is one already. One of many writers wins."""
        ...

    def writer(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A stream into a file that appears whole (and durable on a local disk) when the block ends.

        When the block is left by an error, or by a kill, whatever was there before still is.
        """
        ...

    def names(self, path: str = "") -> list[str]:
        """Sorted names directly below a folder; empty when there is no such folder."""
        ...

    def exists(self, path: str) -> bool: ...
    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all in it; nothing happens when there is none."""
        ...

    def move(self, path: str, to: str) -> None:
        """Rename a file or folder; on an object store this is a copy and a delete, so never a commit."""
        ...

    def path(self, path: str = "") -> Path | None:
        """The local path, or None when the root is not on a local disk."""
        ...


def open_storage(url: str) -> Storage:
    """The storage for a path or a URL (`file://` and plain paths are local)."""
    if url.startswith("file://"):
        return LocalStorage(url.removeprefix("file://"))
    if "://" in url:
        return RemoteStorage(url.rstrip("/"))
    return LocalStorage(url)


def join_url(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


class LocalStorage:
    """A folder on a disk that this machine mounts."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)

    def path(self, path: str = "") -> Path:
        return self.root / path

    def read(self, path: str) -> bytes:
        with _clear_errors("read", self.path(path)):
            return self.path(path).read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with _clear_errors("read", self.path(path)), self.path(path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, path: str) -> int:
        with _clear_errors("read", self.path(path)):
            return self.path(path).stat().st_size

    def write(self, path: str, data: bytes) -> None:
        with self._staged(path, os.replace) as file:
            file.write(data)

    def create(self, path: str, data: bytes) -> bool:
        try:
            # A link appears with its whole content or not at all, and fails if the name is taken.
            with self._staged(path, os.link) as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    @contextlib.contextmanager
    def _staged(self, path: str, publish: Callable[[Path, Path], None]) -> Iterator[IO[bytes]]:
        """A file that grows under a hidden name; complete and on the disk, it is published under its own."""
        target = self.path(path)
        with _clear_errors("write", target):
            _make_folder(target.parent)
            staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}{STAGED}")
            try:
                with staged.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                publish(staged, target)
                _sync_folder(target.parent)
            finally:
                staged.unlink(missing_ok=True)

    def writer(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return self._staged(path, os.replace)

    def names(self, path: str = "") -> list[str]:
        with _clear_errors("read", self.path(path)):
            try:
                return sorted(name for name in os.listdir(self.path(path)) if not name.endswith(STAGED))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def exists(self, path: str) -> bool:
        return self.path(path).exists()

    def delete(self, path: str) -> None:
        target = self.path(path)
        with _clear_errors("remove", target):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def move(self, path: str, to: str) -> None:
        with _clear_errors("move", self.path(path)):
            _make_folder(self.path(to).parent)
            self.path(path).rename(self.path(to))


class RemoteStorage:
    """A prefix on any store that fsspec knows; transient faults are retried with full-jitter back-off."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: tuple[int, Any, str] | None = None

    def path(self, path: str = "") -> None:
        return None

    @property
    def _fs(self) -> Any:
        return self._open()[0]

    def _open(self) -> tuple[Any, str]:
        # Clients of async stores do not survive a fork, so each process opens its own.
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            try:
                fs, root = fsspec.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise StorageError(f"cannot open {self.url}: {error}") from error
            self._opened = (os.getpid(), fs, root)
        return self._opened[1], self._opened[2]

    def _at(self, path: str) -> str:
        return f"{self._open()[1]}/{path}".rstrip("/")

    def _try(self, work: Callable[[], T]) -> T:
        return retry(work, self.url)

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """What is not found while writing is the bucket."""
        try:
            yield
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {self.url}: there is no such bucket ({error})") from error

    def read(self, path: str) -> bytes:
        data: bytes = self._try(lambda: self._fs.cat_file(self._at(path)))
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        if start >= stop:  # HTTP has no empty range: s3fs would give the whole file
            return b""
        data: bytes = self._try(lambda: self._fs.cat_file(self._at(path), start=start, end=stop))
        return data

    def size(self, path: str) -> int:
        return int(self._try(lambda: self._fs.info(self._at(path))["size"]))

    def write(self, path: str, data: bytes) -> None:
        with self._there():
            self._try(lambda: self._fs.pipe_file(self._at(path), data))

    def create(self, path: str, data: bytes) -> bool:
        try:
            with self._there():
                self._try(lambda: self._fs.pipe_file(self._at(path), data, mode="create"))
        except FileExistsError:
            # An answer that got lost is retried and then meets its own file: what counts is whose bytes are there.
            return self.read(path) == data
        self._forget(path)
        return True

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[IO[bytes]]:
        whole = self.url.split(":", 1)[0] in OBJECT_STORES
        to = path if whole else f"{path}.{uuid.uuid4().hex}{STAGED}"
        with self._there(), _clear_errors("write", f"{self.url}/{path}"):
            file = self._fs.open(self._at(to), "wb")
            try:
                yield file
            except BaseException:
                self._break_off(file, None if whole else to)
                raise
            file.close()
        if not whole:
            self.move(to, path)
        self._forget(path)

    def _break_off(self, file: Any, staged: str | None) -> None:
        """Throw away what was written; to close the stream as usual would publish it."""
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
            found = self._try(lambda: self._fs.ls(self._at(path), detail=False, refresh=True))
        except FileNotFoundError:
            return []
        inside = {str(name).rstrip("/") for name in found} - {self._at(path)}
        return sorted(name.rsplit("/", 1)[-1] for name in inside if not name.endswith(STAGED))

    def exists(self, path: str) -> bool:
        self._forget(path)
        return bool(self._try(lambda: self._fs.exists(self._at(path))))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda: self._fs.rm(self._at(path), recursive=True))
        self._forget(path)

    def move(self, path: str, to: str) -> None:
        self._forget(path)
        source, target = self._at(path), self._at(to)
        for file in self._try(lambda: self._fs.find(source)):
            goal = f"{target}{str(file).removeprefix(source)}"
            self._try(functools.partial(self._fs.cp_file, file, goal))
        self.delete(path)
        self._forget(path)

    def _forget(self, path: str) -> None:
        """fsspec remembers listings; other processes write to this folder too, so every look is a fresh one."""
        self._fs.invalidate_cache()


def retry(work: Callable[[], T], what: str) -> T:
    """Do `work`, again after a transient fault; StorageError in one line when the store stays unwell."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            raise
        except PermissionError as error:
            raise StorageError(f"{what}: permission denied ({error})") from error
        except Exception as error:
            # Clients of stores have exceptions of their own; of Python's own, all but OSError is a fault of ours.
            if type(error).__module__ == "builtins" and not isinstance(error, OSError):
                raise
            if "Credentials" in type(error).__name__:
                raise StorageError(f"{what}: {error}") from error
            if attempt + 1 == ATTEMPTS:
                raise StorageError(f"{what}: gave up after {ATTEMPTS} tries: {error}") from error
            time.sleep(random.uniform(0, FIRST_DELAY_S * 2**attempt))
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _clear_errors(verb: str, where: str | Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        if verb == "read" and isinstance(error, NotADirectoryError):
            raise FileNotFoundError(str(where)) from error
        raise StorageError(f"cannot {verb} {where}: {error.strerror or error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(f"cannot write below {folder}: it is a file, not a folder") from error
    except OSError as error:
        raise StorageError(f"cannot write below {folder}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Storage on a local disk: hard links and renames make files appear at once, fsync makes them durable."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO

from everstep.errors import StorageError
from everstep.storage.base import LARGEST_READ, STAGED

LASTING = (errno.EACCES, errno.EFBIG, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)
"""Errors that the user must fix. Others, such as a full disk, may be gone at the next start."""
WAYS_OUT = {
    errno.EACCES: "ask its owner for access (chmod, or access=group for a run), or use a copy of your own",
    errno.EFBIG: "see who wrote it",
    errno.ELOOP: "put a copy of the file in its place",
    errno.EINVAL: "remove it",
    errno.EISDIR: "name a file in it",
}
"""Remedies for a file that cannot be read, by error number."""
COPIED = 16 << 20
"""Buffer size of a copy, in bytes."""


class LocalStorage:
    """Storage in a folder that this machine mounts."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)

    def path(self, path: str = "") -> Path:
        return self.root / path

    def read(self, path: str) -> bytes:
        with clear_errors("read", self.path(path)), self._open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_READ:
                raise OSError(errno.EFBIG, f"it has {size} bytes (limit {LARGEST_READ})")
            return file.read()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with clear_errors("read", self.path(path)), self._open(path) as file:
            file.seek(start)
            return file.read(stop - start)

    def size(self, path: str) -> int:
        with clear_errors("read", self.path(path)):
            self._refuse_links_out(self.path(path))
            return self.path(path).stat().st_size

    def write(self, path: str, data: bytes) -> None:
        with self._staged(path, os.replace) as file:
            file.write(data)

    def create(self, path: str, data: bytes) -> bool:
        try:
            # A link appears with its whole content or not at all, and fails if the name exists.
            with self._staged(path, os.link) as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    @contextlib.contextmanager
    def _staged(self, path: str, publish: Callable[[Path, Path], None]) -> Iterator[IO[bytes]]:
        """Write a file under a hidden name; once complete and synced to disk, publish it under its own name."""
        target = self.path(path)
        with clear_errors("write", target):
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
        with clear_errors("read", self.path(path)):
            try:
                return sorted(name for name in os.listdir(self.path(path)) if not name.endswith(STAGED))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def exists(self, path: str) -> bool:
        return self.path(path).exists()

    def delete(self, path: str) -> None:
        target = self.path(path)
        with clear_errors("remove", target):
            self._refuse_links(target)
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def _open(self, path: str) -> IO[bytes]:
        self._refuse_links_out(self.path(path))
        return open_regular(self.path(path))

    def _refuse_links_out(self, target: Path) -> None:
        """Raise if a link below the root leads out of it: a log or record from elsewhere may name any file."""
        below = (at for at in (target, *target.parents) if at != self.root and at.is_relative_to(self.root))
        if any(at.is_symlink() for at in below):
            real = os.path.realpath(target)
            if not Path(real).is_relative_to(os.path.realpath(self.root)):
                raise OSError(errno.ELOOP, f"it is a link to {real}, outside of {self.root}")

    def _refuse_links(self, target: Path) -> None:
        """Raise if a folder between the root and `target` is a link: what is removed must be below the root."""
        for folder in target.parents:
            if folder == self.root or not folder.is_relative_to(self.root):
                return
            if folder.is_symlink():
                raise OSError(errno.ELOOP, f"{folder} is a link")

    def copy(self, path: str, to: str) -> None:
        if self.path(path).is_dir():
            for name in self.names(path):
                self.copy(f"{path}/{name}", f"{to}/{name}")
            return
        with clear_errors("read", self.path(path)), self._open(path) as source, self.writer(to) as file:
            shutil.copyfileobj(source, file, COPIED)

    def move(self, path: str, to: str) -> None:
        with clear_errors("move", self.path(path)):
            _make_folder(self.path(to).parent)
            self.path(path).rename(self.path(to))


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading; a FIFO or device in its place is an error and not an endless wait."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "it is no regular file")
    return os.fdopen(handle, "rb")


@contextlib.contextmanager
def clear_errors(verb: str, where: str | Path) -> Iterator[None]:
    """Turn errors of the operating system into StorageErrors of one line."""
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        if verb == "read" and isinstance(error, NotADirectoryError):
            raise FileNotFoundError(str(where)) from error
        raise _refusal(f"cannot {verb} {where}", error, WAYS_OUT if verb == "read" else {}) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(f"cannot write below {folder}: it is a file, not a folder") from error
    except OSError as error:
        raise _refusal(f"cannot write below {folder}", error) from error


def _refusal(what: str, error: OSError, ways_out: Mapping[int, str] = MappingProxyType({})) -> StorageError:
    way_out = ways_out.get(error.errno or 0)
    refused = StorageError(f"{what}: {error.strerror or error}" + (f"; {way_out}" if way_out else ""))
    refused.passing = error.errno not in LASTING
    return refused


def _sync_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Listing of sources: from paths, folders, globs and URLs to files, always in the same order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any, cast

from everstep.dataset.readers.base import File
from everstep.errors import ConfigError, DataError, StorageError
from everstep.storage import CREDENTIALS, filesystem, retry

STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")
"""Stores' names of the time or tag that changes with a file's content; the first one present is used."""
AHEAD = 8 << 20
"""Bytes that are read from a store at a time."""


def list_files(sources: Sequence[str]) -> list[File]:
    """Return the files, each once, sorted within each source.

    Raises:
        DataError: a source matches no file.
    """
    found: dict[str, File] = {}
    for source in sources:
        if CREDENTIALS.match(source):
            raise ConfigError(
                "src=…: the URL holds a password, which records would show; leave it out, and name it in the "
                "environment as for other stores"
            )
        local = not is_url(source)
        files = sorted(_local(_path(source)) if local else _remote(source), key=lambda file: file.url)
        if not files:
            raise DataError(f"src={source} matches no file")
        for file in files:
            found.setdefault(file.url, file)
    return list(found.values())


def is_url(source: str) -> bool:
    """True if a source is in a store rather than on a disk."""
    return "://" in source and not source.startswith("file://")


def open_file(file: File) -> IO[bytes]:
    """Open the file at its beginning; remote ones are read ahead in blocks."""
    try:
        if not is_url(file.url):
            return open(file.url, "rb")
        client, path = filesystem(file.url, shared=True)
        return cast(IO[bytes], client.open(path, "rb", block_size=AHEAD))
    except FileNotFoundError:
        raise DataError(f"{file.url} is gone since the files were listed; start again") from None
    except PermissionError as error:
        raise StorageError(f"cannot read {file.url}: permission denied") from error


def read_file(file: File, start: int = 0, stop: int | None = None) -> bytes:
    """Return bytes [start, stop) of a file."""
    if is_url(file.url):
        client, path = filesystem(file.url, shared=True)
        stop = file.size if stop is None else min(stop, file.size)
        if start >= stop:
            return b""
        data: bytes = retry(lambda: client.cat_file(path, start=start, end=stop), file.url)
        return data
    with open_file(file) as opened:
        opened.seek(start)
        return opened.read(-1 if stop is None else stop - start)


def read_files(files: Sequence[File]) -> list[bytes]:
    """Return the content of many small files; from a store, several at a time."""
    if not files or not is_url(files[0].url):
        return [read_file(file) for file in files]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read_file, files))


def _path(source: str) -> str:
    return os.path.expanduser(source.removeprefix("file://"))


def _local(source: str) -> Iterator[File]:
    if os.path.isdir(source):
        root, names = source, _walk(source)
    elif os.path.isfile(source):
        root, names = os.path.dirname(source), iter([source])
    else:
        root = source[: min((source.index(c) for c in "*?[" if c in source), default=0)].rpartition("/")[0]
        names = (name for name in glob.iglob(source, recursive=True) if os.path.isfile(name))
    for name in names:
        try:
            facts = os.stat(name)
        except OSError as error:
            raise DataError(f"{name} of src={source} cannot be read: {error.strerror}") from error
        yield File(name, facts.st_size, str(facts.st_mtime_ns), os.path.relpath(name, root or None))


def _walk(folder: str) -> Iterator[str]:
    """Yield all files of a folder, without hidden ones."""
    for parent, children, files in os.walk(folder):
        children[:] = [child for child in children if not child.startswith(".")]
        yield from (os.path.join(parent, file) for file in files if not file.startswith("."))


def _remote(source: str) -> Iterator[File]:
    client, path = filesystem(source, shared=True)
    client.invalidate_cache()
    try:
        magic = any(character in path for character in "*?[")
        found = retry(lambda: client.glob(path, detail=True) if magic else client.find(path, detail=True), source)
    except FileNotFoundError:
        return
    root = path[: min((path.index(c) for c in "*?[" if c in path), default=len(path))] if magic else path
    folder = root.rpartition("/")[0] if magic or list(found) == [path] else root.rstrip("/")
    for name, facts in found.items():
        hidden = any(part.startswith(".") for part in name[len(folder) :].split("/"))
        if facts["type"] == "file" and not (hidden and not magic):
            yield File(client.unstrip_protocol(name), int(facts["size"]), _stamp(facts), name[len(folder) + 1 :])


def _stamp(facts: dict[str, Any]) -> str:
    return next((str(facts[name]) for name in STAMPS if facts.get(name)), "")

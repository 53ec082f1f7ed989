"""Files of a tar archive, in order.

A truncated archive is an error; Python would take it for the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from everstep.dataset.readers.base import LONGEST_BYTES, Bad, File
from everstep.dataset.readers.source_files import is_url, open_file
from everstep.dataset.readers.streams import CutShortError, codec_of, open_plain

BLOCK = 1 << 20
LONGEST_HEADER = 1 << 20
"""Bytes of an extended header or a long name, which tarfile reads as a whole."""
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Entry(NamedTuple):
    """One file of an archive."""

    key: str
    """Path up to the first dot of the name: files of one sample share it."""
    extension: str
    size: int
    content: bytes
    """Empty if only names are requested."""


class _Info(tarfile.TarInfo):
    """Header of an entry; it sets `has_end` of the archive at the mark of its end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.has_end = True  # type: ignore[attr-defined]
            raise

    def _proc_member(self, tarfile_: tarfile.TarFile) -> Any:
        if self.type in EXTENDED and self.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes, over the limit of {LONGEST_HEADER}")
        return super()._proc_member(tarfile_)  # type: ignore[misc]


def entries(file: File, contents: bool = True) -> Iterator[Entry | Bad]:
    """Yield the files named KEY.EXTENSION, and as bad records all others but hidden ones and folders.

    Raises:
        CutShortError: the archive is truncated, or continues after its end.
    """
    count = 0
    try:
        with _open(file) as tar:
            for member in tar:
                entry = _entry(file, tar, member, contents)
                if entry is not None:
                    yield entry
                count += member.isfile()
                tar.members.clear()  # type: ignore[attr-defined]  # a list that only grows: headers compress a thousand to one
            _check_end(file, tar, count)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise CutShortError(
            f"{file.url} is no whole tar file after file {count}: {str(error).splitlines()[0]}"
        ) from error


def _open(file: File) -> tarfile.TarFile:
    if codec_of(file) is not None:
        return tarfile.open(fileobj=open_plain(file), mode="r|", tarinfo=_Info)
    if is_url(file.url):
        return tarfile.open(fileobj=open_file(file), mode="r|*", tarinfo=_Info)
    return tarfile.open(file.url, mode="r:*", tarinfo=_Info)  # skips contents that are not read


def _entry(file: File, tar: tarfile.TarFile, member: tarfile.TarInfo, contents: bool) -> Entry | Bad | None:
    folder, _, name = member.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    if member.isdir() or not stem:
        return None
    if not member.isfile():
        return Bad(f"{file.url}: {member.name}", "is a link or device, which has no content here")
    if not dot:
        return Bad(f"{file.url}: {member.name}", "has no extension, so it is no part of a sample")
    if member.size > LONGEST_BYTES:
        return Bad(f"{file.url}: {member.name}", f"is {member.size} bytes, over the limit of {LONGEST_BYTES}")
    data = b""
    if contents:
        opened = tar.extractfile(member)
        data = opened.read() if opened is not None else b""
    return Entry(f"{folder}/{stem}" if folder else stem, extension.lower(), member.size, data)


def _check_end(file: File, tar: tarfile.TarFile, count: int) -> None:
    if not getattr(tar, "has_end", False):
        raise CutShortError(f"{file.url} is cut short or damaged after file {count}: it has no mark of its end")
    source: Any = tar.fileobj
    while data := source.read(BLOCK):
        if data.count(0) < len(data):
            raise CutShortError(f"{file.url} goes on after the mark of its end, after file {count}")

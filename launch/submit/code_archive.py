"""Archive of code: files and links in a reproducible tar; extraction that stays in its folder."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from everstep.errors import EverstepError

UNPACKED_LIMIT_MB = 1000
"""Limit of the unpacked size of a snapshot, or twice the job.code_mb of its job if that is more."""
MOST_MEMBERS = 500_000
"""Limit of the files and links in a snapshot: each costs memory and an inode."""
CHUNK = 1 << 20
"""Bytes to read at once; also the limit of a header, which tarfile reads whole."""


class SnapshotError(EverstepError):
    """A snapshot whose content does not match its digest, or with a path outside its folder."""


@dataclass(frozen=True)
class SnapshotFile:
    """One file of the code; the data of a link is its target."""

    path: str
    data: bytes
    mode: int = 0o644
    link: bool = False


def digest_of(members: Sequence[SnapshotFile]) -> str:
    """Return the digest of the files' paths, modes and contents; times and owners do not change it."""
    from blake3 import blake3

    whole = blake3()
    for member in sorted(members, key=lambda member: member.path):
        whole.update(_head(member, len(member.data)))
        whole.update(member.data)
    return whole.hexdigest()[:32]


def _head(member: SnapshotFile, size: int) -> bytes:
    """Return the bytes that the digest takes before a member's data; lengths keep adjacent fields apart."""
    return f"{len(member.path.encode())}:{member.path}:{member.mode:o}:{int(member.link)}:{size}:".encode()


def pack(members: Sequence[SnapshotFile]) -> bytes:
    """Return a reproducible archive, without times, owners and host: equal members give equal bytes."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=0, compresslevel=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for member in sorted(members, key=lambda member: member.path):
            info = tarfile.TarInfo(member.path)
            info.mode = member.mode
            if member.link:
                info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(member.data)
                tar.addfile(info)
            else:
                info.size = len(member.data)
                tar.addfile(info, io.BytesIO(member.data))
    return packed.getvalue()


def stays_inside(path: str, target: str) -> bool:
    """True if a link at `path` leads to a path in the same tree; links along the target are not followed."""
    if target.startswith("/"):
        return False
    depth = len(PurePosixPath(path).parts) - 1
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return False
    return True


class _Unpacked(gzip.GzipFile):
    """Unpacked bytes of an archive, with a limit of their number and of the size of a header."""

    def __init__(self, packed: IO[bytes], where: str, limit: int) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._where, self._limit = where, limit

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= CHUNK:
            raise SnapshotError(f"{self._where} has a header of {size} bytes (limit {CHUNK})")
        _check_room(self.tell() + size, self._limit, self._where)
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        _check_room(offset, self._limit, self._where)
        return super().seek(offset, whence)


def _check_room(position: int, limit: int, where: str) -> None:
    if position > limit:
        raise SnapshotError(f"{where} unpacks to more than {limit / 1e6:.0f} MB; see who wrote it or raise job.code_mb")


def extract(packed: IO[bytes], folder: Path, where: str, limit_mb: float = UNPACKED_LIMIT_MB) -> str:
    """Write an archive from an untrusted source into a new folder; return the digest of its members.

    Memory does not grow with the files. Links are made last, so that no file is written through one.

    Raises:
        SnapshotError: the archive is damaged or too large, or a member would leave the folder.
    """
    from blake3 import blake3

    folder.mkdir(parents=True)
    whole, links = blake3(), []
    limit = int(limit_mb * 1e6)
    try:
        with tarfile.open(fileobj=_Unpacked(packed, where, limit), mode="r:") as tar:
            for info in _infos(tar, where, limit):
                member = _member(info, where)
                if member.link:
                    whole.update(_head(member, len(member.data)) + member.data)
                    links.append(member)
                else:
                    whole.update(_head(member, info.size))
                    _write(folder, member, _content(tar, info), whole.update)
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise SnapshotError(f"{where} is damaged: {error}") from error
    _link(links, folder)
    return whole.hexdigest()[:32]


def _infos(tar: tarfile.TarFile, where: str, limit: int) -> Iterator[tarfile.TarInfo]:
    """Yield the headers, which must be in the order of `pack`, and keep none of them."""
    room, count, last = limit, 0, ""
    while (info := tar.next()) is not None:
        vars(tar)["members"].clear()
        count, room = count + 1, room - info.size  # a sparse file unpacks to more than its bytes in the archive
        _check_room(limit - room, limit, where)
        if count > MOST_MEMBERS:
            raise SnapshotError(f"{where} has more than {MOST_MEMBERS} files; see who wrote it")
        if count > 1 and info.name <= last:
            raise SnapshotError(f"{where} holds {info.name!r} out of order")
        last = info.name
        yield info


def _member(info: tarfile.TarInfo, where: str) -> SnapshotFile:
    """Return a member without its content; SnapshotError if it is no file and no link within."""
    parts = PurePosixPath(info.name).parts
    if info.name.startswith("/") or ".." in parts or not parts:
        raise SnapshotError(f"{where} holds {info.name!r}, which lies outside of it")
    if info.issym() and stays_inside(info.name, info.linkname):
        return SnapshotFile(info.name, os.fsencode(info.linkname), 0o777, link=True)
    if not info.isreg():
        raise SnapshotError(f"{where} holds {info.name!r}, which is neither a file nor a link within it")
    return SnapshotFile(info.name, b"", 0o755 if info.mode & 0o100 else 0o644)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    content = tar.extractfile(info)
    while content is not None and (chunk := content.read(CHUNK)):
        yield chunk


def _write(folder: Path, member: SnapshotFile, content: Iterator[bytes], digest: Callable[[bytes], object]) -> None:
    target = folder / member.path
    with _free_place(member):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for chunk in content:
                digest(chunk)
                file.write(chunk)
        target.chmod(member.mode)


def _link(links: Sequence[SnapshotFile], folder: Path) -> None:
    for member in links:
        target = folder / member.path
        with _free_place(member):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.fsdecode(member.data))
    top = os.path.realpath(folder)
    for member in links:
        # Links through other links may lead out of the folder although each target alone stays inside.
        if not Path(os.path.realpath(folder / member.path)).is_relative_to(top):
            raise SnapshotError(f"{member.path} of the code is a link out of it")


@contextlib.contextmanager
def _free_place(member: SnapshotFile) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise SnapshotError(f"{member.path} of the code lies in the way of another file") from error

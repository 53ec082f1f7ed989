"""Archive of code: files and links in a reproducible tar; extraction that stays in its folder."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from everstep.errors import EverstepError

UNPACKED_LIMIT_MB = 4096
"""Limit of the unpacked size of a snapshot from another source; unpacking stops there."""


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
        # The lengths keep the fields of adjacent files from running into each other.
        head = f"{len(member.path.encode())}:{member.path}:{member.mode:o}:{int(member.link)}:{len(member.data)}:"
        whole.update(head.encode())
        whole.update(member.data)
    return whole.hexdigest()[:32]


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


def read_archive(packed: bytes, where: str) -> list[SnapshotFile]:
    """Return the members of an archive from an untrusted source."""
    members: list[SnapshotFile] = []
    room = UNPACKED_LIMIT_MB * 10**6
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
            for info in tar:
                room -= info.size
                if room < 0:
                    raise SnapshotError(f"{where} unpacks to more than {UNPACKED_LIMIT_MB} MB")
                members.append(_member(tar, info, where))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SnapshotError(f"{where} is damaged: {error}") from error
    return members


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, where: str) -> SnapshotFile:
    parts = PurePosixPath(info.name).parts
    if info.name.startswith("/") or ".." in parts or not parts:
        raise SnapshotError(f"{where} holds {info.name!r}, which lies outside of it")
    if info.issym() and stays_inside(info.name, info.linkname):
        return SnapshotFile(info.name, os.fsencode(info.linkname), 0o777, link=True)
    content = tar.extractfile(info) if info.isreg() else None
    if content is None:
        raise SnapshotError(f"{where} holds {info.name!r}, which is neither a file nor a link within it")
    return SnapshotFile(info.name, content.read(), 0o755 if info.mode & 0o100 else 0o644)


def write_files(members: Sequence[SnapshotFile], folder: Path) -> None:
    """Write the files first and the links last, so that no file is written through a link."""
    folder.mkdir(parents=True)
    for member in sorted(members, key=lambda member: member.link):
        target = folder / member.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.link:
                target.symlink_to(os.fsdecode(member.data))
            else:
                target.write_bytes(member.data)
                target.chmod(member.mode)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise SnapshotError(f"{member.path} of the code lies in the way of another file") from error
    top = os.path.realpath(folder)
    for member in members:
        # Links through other links may lead out of the folder although each target alone stays inside.
        if member.link and not Path(os.path.realpath(folder / member.path)).is_relative_to(top):
            raise SnapshotError(f"{member.path} of the code is a link out of it")

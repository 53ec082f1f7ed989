"""Snapshot of the user's code at submission, stored in the run folder once per content.

It holds the tracked files and the untracked files that git does not ignore, with uncommitted changes. A queued job
runs the snapshot, so later edits do not affect it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from everstep.errors import ConfigError
from everstep.launch.submit.code_archive import (
    MOST_MEMBERS,
    UNPACKED_LIMIT_MB,
    SnapshotError,
    SnapshotFile,
    digest_of,
    extract,
    pack,
    stays_inside,
)
from everstep.launch.submit.plain_folder import code_of
from everstep.run_folder import CODE, RunFolder
from everstep.security.private_folder import private_folder
from everstep.security.secret_detection import holds_secret, is_secret_file
from everstep.storage import Storage
from everstep.storage.local import clear_errors, open_regular

LIMIT_MB = 100
"""Limit of a snapshot's size, before compression."""
READ_AHEAD = 8 << 20
"""Bytes that are read at once from a store."""
DIGEST = re.compile(r"[0-9a-f]{32}")
NAMED = 5
"""Number of the largest files that the error for too large a snapshot names."""


@dataclass(frozen=True)
class Snapshot:
    """A stored snapshot: unpack it by its digest and start in `folder` below it."""

    digest: str
    folder: str
    """Path of the current folder in the checkout, with '/'; empty at its top."""
    files: int
    left_out: tuple[str, ...] = ()
    """Links that lead out of the checkout."""
    secrets: tuple[str, ...] = ()
    """Files that look like secrets; they are not in the snapshot."""

    @property
    def place(self) -> str:
        """Reference in a submission: DIGEST or DIGEST/FOLDER."""
        return f"{self.digest}/{self.folder}".rstrip("/")


def take(
    run: RunFolder,
    where: Path,
    plugins: Sequence[str] = (),
    scripts: Sequence[str] = (),
    limit_mb: float = LIMIT_MB,
    keep: Sequence[str] = (),
) -> Snapshot:
    """Store the code below `where` in the run folder; content that is there already is not written again.

    Args:
        plugins: packages of the user; outside a git checkout these are taken, with what they import from `where`.
        scripts: files to take as well.
        keep: patterns of files to take although they look like secrets.

    Raises:
        ConfigError: the code is larger than `limit_mb`; the message names the largest files.
    """
    top = _checkout(where)
    root = top or where.resolve()
    paths = _tracked(top) if top is not None else code_of(where, plugins, scripts)
    paths = _without_runs(root, paths, run)
    _check_size(root, paths, limit_mb)
    members, left_out = _members(root, paths)
    members, secrets = _without_secrets(members, keep)
    digest = digest_of(members)
    if not run.storage.exists(archive(digest)):
        run.storage.create(archive(digest), pack(members))
    inside = where.resolve().relative_to(root).as_posix()
    return Snapshot(digest, "" if inside == "." else inside, len(members), tuple(left_out), tuple(secrets))


def archive(digest: str) -> str:
    """Return the path of a snapshot in a run folder."""
    return f"{CODE}/{digest}.tar.gz"


def node_folder() -> Path:
    """Return the folder on this node's disk for unpacked code, writable only by this user, as it is run.

    Raises:
        SnapshotError: another user has made the folder or may write to it.
    """
    try:
        place = Path(tempfile.gettempdir())
        return private_folder(place / f"everstep-code-{os.getuid()}", "TMPDIR", place)
    except ConfigError as error:
        raise SnapshotError(str(error)) from error


def unpack(run: RunFolder, digest: str, into: Path, limit_mb: float = LIMIT_MB) -> Path:
    """Unpack a snapshot below `into` and return the folder with the code.

    All processes of a node may call this at once: the folder appears complete, by a rename.

    Args:
        limit_mb: job.code_mb of the job.

    Raises:
        SnapshotError: the archive does not match its digest, or has a path outside its folder.
    """
    final = into / digest
    if final.is_dir():
        return final
    staged = into / f".{digest}.{uuid.uuid4().hex}"
    where = f"{run.url}/{archive(digest)}"
    try:
        with _opened(run.storage, archive(digest)) as packed:
            found = extract(packed, staged, where, max(UNPACKED_LIMIT_MB, 2 * limit_mb))
        if found != digest:
            raise SnapshotError(f"{where} does not hold the code that its name says")
        with contextlib.suppress(OSError):  # another process was faster, with the same content
            staged.rename(final)
    except FileNotFoundError as error:
        raise SnapshotError(f"{run.url} has no {archive(digest)}: the code of this job is gone") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if not final.is_dir():
        raise SnapshotError(f"cannot unpack code to {final}; is there room on the disk?")
    return final


def open_code(run: RunFolder, place: str, limit_mb: float = LIMIT_MB) -> Path:
    """Return the folder on this node with the code of a submission, unpacked if needed.

    Args:
        place: DIGEST or DIGEST/FOLDER, as returned by `Snapshot.place`.
        limit_mb: job.code_mb of the job.

    Raises:
        SnapshotError: the snapshot is missing or damaged, or the disk is full.
    """
    digest, _, folder = place.partition("/")
    if not DIGEST.fullmatch(digest) or folder.startswith("/") or ".." in folder.split("/"):
        raise SnapshotError(f"{run.url}: its code is at {place!r}, which is not DIGEST/FOLDER; submit again")
    code = unpack(run, digest, node_folder(), limit_mb)
    if not Path(os.path.realpath(code / folder)).is_relative_to(os.path.realpath(code)):
        raise SnapshotError(f"{run.url}: its code is at {place!r}, which leads out of the snapshot; submit again")
    return code / folder


def _opened(storage: Storage, path: str) -> IO[bytes]:
    """Open a file of any storage; FileNotFoundError if it is missing."""
    local = storage.path(path)
    if local is None:
        return io.BufferedReader(_Ranges(storage, path), READ_AHEAD)
    with clear_errors("read", local):
        return open_regular(local)


class _Ranges(io.RawIOBase):
    """A file in a store, read a range at a time."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._size, self._at = storage.size(path), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._at + len(buffer))
        data = self._storage.read_range(self._path, self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def search_path(code: Path, given: str = "", first: str = "") -> dict[str, str]:
    """Return the environment in which Python imports from the snapshot before the current folder.

    Args:
        given: PYTHONPATH of the user.
        first: folder of the script that is started, which Python by itself would put first.
    """
    paths = [path for path in (first, str(code), given, os.getcwd()) if path]
    # Without PYTHONSAFEPATH the current folder, whose files may be edited meanwhile, would come first.
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}


def _checkout(where: Path) -> Path | None:
    top = _git(where, "rev-parse", "--show-toplevel")
    return None if top is None else Path(os.fsdecode(top.rstrip(b"\n"))).resolve()


def _tracked(top: Path) -> list[str]:
    """Return the tracked files and the untracked ones that git does not ignore, with those of submodules."""
    listed = _git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate") or b""
    found: list[str] = []
    for name in filter(None, os.fsdecode(listed).split("\0")):
        path = top / name
        if path.is_symlink() or path.is_file():
            found.append(name)
        elif path.is_dir() and (path / ".git").exists():
            found += [f"{name.rstrip('/')}/{inner}" for inner in _tracked(path)]
    return found


def _without_runs(root: Path, paths: Sequence[str], run: RunFolder) -> list[str]:
    """Leave out the folder of runs, which many users do not list in .gitignore."""
    local = run.storage.path()
    if local is None or not local.parent.resolve().is_relative_to(root) or local.parent.resolve() == root:
        return list(paths)
    runs = local.parent.resolve().relative_to(root).as_posix()
    return [path for path in paths if not path.startswith(f"{runs}/")]


def _check_size(root: Path, paths: Sequence[str], limit_mb: float) -> None:
    sizes = {path: (root / path).lstat().st_size for path in paths if (root / path).exists()}
    if len(sizes) > MOST_MEMBERS:
        raise ConfigError(
            f"the code in {root} has {len(sizes)} files (limit {MOST_MEMBERS}); name what is no code in .gitignore"
        )
    whole_mb = sum(sizes.values()) / 1e6
    if whole_mb > limit_mb:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:NAMED]
        named = ", ".join(f"{path} {sizes[path] / 1e6:.1f} MB" for path in largest)
        raise ConfigError(
            f"the code in {root} has {whole_mb:.0f} MB, more than job.code_mb={limit_mb:g} (largest: {named}); "
            "name what is no code in .gitignore, or change job.code_mb"
        )


def _members(root: Path, paths: Sequence[str]) -> tuple[list[SnapshotFile], list[str]]:
    members, left_out = [], []
    for path in sorted(set(paths)):
        file = root / path
        if file.is_symlink():
            target = os.readlink(file)
            if stays_inside(path, target):
                members.append(SnapshotFile(path, os.fsencode(target), 0o777, link=True))
            else:
                left_out.append(path)
        elif file.is_file():
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                members.append(SnapshotFile(path, file.read_bytes(), 0o755 if os.access(file, os.X_OK) else 0o644))
    return members, left_out


def _without_secrets(members: Sequence[SnapshotFile], keep: Sequence[str]) -> tuple[list[SnapshotFile], list[str]]:
    """Return the files to take, and the paths of those that look like secrets."""

    def looks_secret(member: SnapshotFile) -> bool:
        if any(fnmatch.fnmatch(member.path, pattern) for pattern in keep):
            return False
        return is_secret_file(member.path) or (not member.link and holds_secret(member.data))

    secrets = [member.path for member in members if looks_secret(member)]
    return [member for member in members if member.path not in secrets], secrets


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

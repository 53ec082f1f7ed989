"""The container of a pod: a process in namespaces of its own, or a plain one where the kernel lets us make none."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

BOOT = Path(__file__).parent / "boot_container.sh"
UNSHARE = ("unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child=KILL", "sh", str(BOOT))
PAGE = os.sysconf("SC_PAGE_SIZE")


class NotStarted(Exception):
    """The program of a pod is not there, or is none."""


@dataclass(frozen=True)
class Own:
    """What a container has for itself besides its processes. `hosts` becomes /etc/hosts."""

    hostname: str
    hosts: Path
    shm_bytes: int = 64 * 2**20
    """Size of /dev/shm. This is what a container has where its pod says nothing."""

    @property
    def words(self) -> list[str]:
        return [*UNSHARE, self.hostname, str(self.hosts), str(self.shm_bytes)]


@functools.cache
def why_plain() -> str | None:
    """Why containers are plain processes here; None where they have namespaces. Nothing else decides that."""
    with tempfile.NamedTemporaryFile() as hosts, Path(os.devnull).open("wb") as nobody:
        try:
            tried = subprocess.run([*Own("trial", Path(hosts.name)).words, "true"], stdin=nobody, capture_output=True,
                                   text=True, check=False)  # fmt: skip
        except FileNotFoundError:
            return "unshare(1) of util-linux is not there"
    return None if tried.returncode == 0 else tried.stderr.strip() or f"exit code {tried.returncode}"


@dataclass
class Container:
    """`child` is what the agent waits for; `pid` is the main process, by its number outside."""

    child: subprocess.Popen[bytes]
    pid: int
    isolated: bool

    @staticmethod
    def start(words: list[str], env: dict[str, str], log: Path, own: Own, where: str | None = None) -> Container:
        """In the folder `where`. NotStarted when the program is not found."""
        if shutil.which(words[0], path=env["PATH"]) is None:
            raise NotStarted(f'exec: "{words[0]}": executable file not found in $PATH')
        if why_plain() is not None:
            child = _popen(words, env, log, subprocess.DEVNULL, where)
            return Container(child, child.pid, isolated=False)
        read, write = os.pipe()
        with os.fdopen(read) as ear:
            with os.fdopen(write, "w"):
                child = _popen([*own.words, *words], env, log, write, where)
            told = ear.readline()
        if not told:
            child.wait()
            raise NotStarted(log.read_text().strip())
        return Container(child, int(told), isolated=True)

    def memory(self) -> int:
        """Bytes that it is charged for: pages of its processes' own, and what it keeps in a /dev/shm of its own."""
        kept = 0
        if self.isolated:
            with contextlib.suppress(OSError):  # it has just ended
                shm = os.statvfs(f"/proc/{self.pid}/root/dev/shm")
                kept = (shm.f_blocks - shm.f_bfree) * shm.f_frsize
        return kept + sum(map(_pages, _family(self.pid))) * PAGE


def _popen(words: list[str], env: dict[str, str], log: Path, stdin: int, where: str | None) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(words, env=env, cwd=where, stdin=stdin, stdout=out, stderr=out, start_new_session=True)


def _family(pid: int) -> list[int]:
    """A process and all that comes from it. In a namespace none is missed: orphans become children of its process 1."""
    family = [pid]
    for each in family:
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{each}/task").glob("*/children"):
                family += map(int, file.read_text().split())
    return family


def _pages(pid: int) -> int:
    try:
        size = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(size[1]) - int(size[2])

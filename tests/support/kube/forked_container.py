"""A container whose main process is forked, for the fixture `warm`: as unshare(1) and boot_container.sh set it up."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from support.kube.node_container import BOOT, UNSHARE

NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWPID."""
PRIVATE = 0x4000 | 0x40000
"""MS_REC | MS_PRIVATE."""
DEATH_SIGNAL = 1


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options of a container, and the program in it; no options if the words make no container."""
    if tuple(words[: len(UNSHARE)]) != UNSHARE:
        return [], list(words)
    at = len(UNSHARE) + 3
    return list(words[len(UNSHARE) : at]), list(words[at:])


def enter(own: Sequence[str]) -> None:
    """Return in the first process of new namespaces; the one that called waits for it, and ends as it does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NAMESPACES):
        raise OSError(ctypes.get_errno(), "unshare")
    if (pid := os.fork()) != 0:
        _wait(pid)
    libc.prctl(DEATH_SIGNAL, signal.SIGKILL)
    libc.mount(b"none", b"/", None, PRIVATE, None)
    number = Path("/proc/self/stat").read_text().split()[0]
    subprocess.run(["sh", "-e", str(BOOT.with_name("mount_container.sh")), *own], check=True)
    os.write(0, f"{number}\n".encode())
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _wait(pid: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.closerange(0, 3)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)

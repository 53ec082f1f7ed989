"""Processes of one start on this machine: a command and those below it, or ranks of the fork server."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from everstep.launch.job_start.hung_agent import HungAgent
from everstep.outcome import Ending
from everstep.processes import children

PR_SET_PDEATHSIG = 1
LEFT = 130
"""Exit code of a trainer that a second signal, such as a second Ctrl-C, made leave at once."""


class Child(Protocol):
    """Processes of one start."""

    pid: int
    """The process that is ours to wait for."""
    name: str
    """Its name in messages."""
    reads: bool
    """True if it may read from the terminal, and then gets the terminal's signals as this process does."""

    def poll(self) -> int | None:
        """Return the exit code as a shell gives it; None while processes run."""

    def descriptors(self) -> list[int]:
        """Return file descriptors that can be read when something has changed."""

    def savers(self) -> list[int]:
        """Return the processes that save when they get SIGTERM."""

    def stop(self) -> None:
        """Send SIGTERM to the processes that save."""

    def is_hung(self) -> bool:
        """True if there are no processes of the start any more, and it has not ended all the same."""

    def kill(self) -> None:
        """Send SIGKILL to all processes of the start, and wait for them."""

    def death(self, killed_for_memory: int) -> Ending | None:
        """Return the ending of a rank that a signal has killed; None without one, or if the child recorded it."""

    def spared(self) -> set[int]:
        """Return processes that outlive the start."""


class Command:
    """A command, with the processes below it.

    Args:
        output: a file descriptor for all output; None is the caller's own.
        agent: the command is torchrun, and the processes that save are its children. They get the signal directly:
            torchrun answers a SIGTERM with a traceback and with exit code 1 although all went well.
        idle_s: seconds that an agent may run after its workers have ended before it counts as hung.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], output: int | None, agent: bool, idle_s: float
    ) -> None:
        # A process group of its own: the terminal's Ctrl-C reaches only the launcher, so the processes get each signal
        # once and in order. A single process stays in our group: it may read from the terminal, as a debugger does.
        self.agent = agent
        self.name = "the agent" if agent else "rank 0"
        self.reads = has_terminal() and not agent
        self._process = subprocess.Popen(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL if has_terminal() and agent else None,
            stdout=output,
            stderr=output,
            process_group=None if self.reads else 0,
            preexec_fn=leash(os.getpid(), hangs_up=not self.reads),
        )
        self.pid = self._process.pid
        self._hung = HungAgent(lambda: children(self.pid), idle_s if agent else float("inf"))

    def poll(self) -> int | None:
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def descriptors(self) -> list[int]:
        return []

    def savers(self) -> list[int]:
        """Return the workers of an agent; an agent without workers yet gets the signal itself."""
        return (children(self.pid) if self.agent else []) or [self.pid]

    def stop(self) -> None:
        for pid in self.savers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def is_hung(self) -> bool:
        return self._hung.is_hung()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait()

    def death(self, killed_for_memory: int) -> Ending | None:
        return None

    def spared(self) -> set[int]:
        return set()


def has_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def leash(parent: int, hangs_up: bool = True) -> Callable[[], None] | None:
    """Return code for the child between fork and exec: the child dies with the launcher, even by kill -9.

    With `hangs_up` False the child ignores the hangup of its terminal: the launcher gets it too and asks the child to
    save.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def arm() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Slurm sends its notice to every process. torchrun would die of it and orphan its workers; they inherit this
        # and install a handler of their own, and until then the stop marker in the run folder replaces the signal.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if not hangs_up:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.getppid() != parent:  # the launcher died before prctl took effect
            os._exit(1)

    return arm

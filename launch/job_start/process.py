"""One child process on this machine: start it, relay signals to it, leave no process behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from everstep.fault import OutOfMemoryCount, death_of
from everstep.launch.job_start.hung_agent import HungAgent
from everstep.outcome import Ending, Outcome
from everstep.processes import children
from everstep.run_folder import ENDING_FILE

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SLACK_S = 10.0
"""Seconds beyond the grace period before a child is killed: torchrun first kills its own children."""
MARKER_S = 1.0
"""Seconds that writing the stop marker to a slow store may delay the signal to the child."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


LEFT = 130
"""Exit code of a trainer that a second signal, such as a second Ctrl-C, made leave at once."""
MOST_SIGNALS = 64
LONGEST_ENDING = 1 << 16
HUNG = "the agent hung: its ranks had ended, and it had not"


class LeftAtOnce(Exception):
    """The user has asked a second time to stop: everything is killed and nothing is saved."""


class Signals:
    """Signals as a queue: a handler only records the number, and a pipe wakes the loop that reads it."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            # A signal that the caller ignores (nohup, a shell's background job) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN or number is signal.SIGCHLD:
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._arrived.append(number)

    def take(self) -> list[int]:
        """Return the signals since the last call, in order."""
        taken, self._arrived[:] = list(self._arrived), []
        return taken

    def wait(self, seconds: float) -> None:
        """Wait until a signal arrives, a child ends, or the time is over."""
        select.select([self._read], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)


class Local:
    """One child at a time, under one set of signals; `stopped` is the signal that asked it to stop.

    `agent`: the child is torchrun, and the processes that save are its children. They get the signal directly: torchrun
    answers a SIGTERM with a traceback and with exit code 1 although all went well. `relay` is False where the scheduler
    itself signals every process.
    """

    def __init__(
        self,
        signals: Signals,
        leave_marker: Callable[[str], None],
        grace_s: float,
        agent: bool = False,
        relay: bool = True,
    ) -> None:
        self.signals = signals
        self.leave_marker = leave_marker
        self.grace_s = grace_s
        self.agent = agent
        self.relay = relay
        self.stopped: str | None = None
        self.handed_over: Ending | None = None
        """Ending of the last child if the run folder did not accept it, or if the child was killed."""
        self.idle_s = grace_s + SLACK_S
        """Seconds that the agent may run after its workers have ended before it counts as hung."""
        self.killed = False
        """True if the last child was killed without a request to stop."""
        self._hung = False
        self.abandon: Callable[[], bool] = lambda: False
        """True as soon as the child is of no more use: it is then killed without a request to stop."""

    def run(self, argv: Sequence[str], env: Mapping[str, str], output: int | None = None) -> int:
        """Run the child to its end and return the exit code as a shell gives it.

        `output`: a file descriptor for all output; None is the caller's own.

        Raises:
            LeftAtOnce: the user has asked a second time to stop.
        """
        spared, memory = _adopt_orphans(), OutOfMemoryCount()
        with EndingFile() as ending:
            code = self._run(argv, {**env, **ending.environment()}, output, spared)
            self.handed_over = ending.read()
        died = 128 < code <= 128 + MOST_SIGNALS and code != LEFT
        self.killed = self.handed_over is None and died and self.stopped is None
        if self.killed:
            reason = death_of("the agent" if self.agent else "rank 0", code - 128, memory.since())
            self.handed_over = Ending(Outcome.crashed, 0, HUNG if self._hung else reason)
        return code

    def _run(self, argv: Sequence[str], env: Mapping[str, str], output: int | None, spared: set[int]) -> int:
        # A process group of its own: the terminal's Ctrl-C reaches only the launcher, so the processes get each signal
        # once and in order. A single process stays in our group: it may read from the terminal, as a debugger does.
        terminal = sys.stdin is not None and sys.stdin.isatty()
        reads = terminal and not self.agent
        child = subprocess.Popen(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL if terminal and self.agent else None,
            stdout=output,
            stderr=output,
            process_group=None if reads else 0,
            preexec_fn=leash(os.getpid(), hangs_up=not reads),
        )
        deadline, agent = float("inf"), HungAgent(child.pid, self.idle_s if self.agent else float("inf"))
        try:
            while child.poll() is None:
                for number in self.signals.take():
                    if self.stopped is not None and number == signal.SIGINT:
                        raise LeftAtOnce
                    if self.stopped is None:
                        self._ask_to_stop(child, number)
                        deadline = time.monotonic() + self.grace_s + SLACK_S
                self._hung = agent.is_hung()
                if time.monotonic() > deadline or self.abandon() or self._hung:
                    _kill(child, spared)
                _bury_orphans(child.pid)
                self.signals.wait(min(1.0, max(0.0, deadline - time.monotonic())))
        finally:
            _kill(child, spared)
        if reads and child.returncode == LEFT:
            raise LeftAtOnce
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def wait(self, seconds: float) -> bool:
        """Wait between two starts; False as soon as a stop is requested or `abandon` is true."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self.stopped is None and not self.abandon():
            self.signals.wait(left)
            self._note_stop()
        self._note_stop()
        return self.stopped is None and not self.abandon()

    def _note_stop(self) -> None:
        for number in self.signals.take():
            self.stopped = self.stopped or signal.Signals(number).name

    def _ask_to_stop(self, child: subprocess.Popen[bytes], number: int) -> None:
        self.stopped = reason = signal.Signals(number).name
        # In a thread, as a store may hang: neither the signal below nor a second Ctrl-C must wait for it.
        writing = threading.Thread(target=self.leave_marker, args=(reason,), daemon=True)
        writing.start()
        writing.join(MARKER_S)
        if not self.relay:
            return
        # An agent without workers yet gets the signal itself.
        for pid in (children(child.pid) if self.agent else []) or [child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


class EndingFile:
    """A file in this process's memory for a child's ending that the run folder does not accept."""

    def __enter__(self) -> EndingFile:
        self._file = os.memfd_create("everstep-ending") if sys.platform == "linux" else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def environment(self) -> dict[str, str]:
        return {} if self._file is None else {ENDING_FILE: f"/proc/{os.getpid()}/fd/{self._file}"}

    def read(self) -> Ending | None:
        """Return the ending that was written; None if there is none or it cannot be read."""
        try:
            return None if self._file is None else Ending.from_json(os.pread(self._file, LONGEST_ENDING, 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


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


def _adopt_orphans() -> set[int]:
    """Make processes whose parents die our children from now on; return our present descendants."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    return set(children(os.getpid(), recursive=True))


def _bury_orphans(child: int) -> None:
    """Reap orphans that have ended: as process 1 of a container this process must do so.

    Children of our own threads are in our process group and the threads wait for them; those of the child are not.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(ChildProcessError, ProcessLookupError):  # there are none, or a thread was faster
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == child or os.getpgid(ended.si_pid) == os.getpgrp():
                return
            os.waitpid(ended.si_pid, 0)


def _kill(child: subprocess.Popen[bytes], spared: set[int]) -> None:
    """Send SIGKILL to the child and all its descendants: torchrun's workers have sessions of their own."""
    doomed = set(children(os.getpid(), recursive=True)) - spared
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    child.wait()
    for pid in doomed:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)

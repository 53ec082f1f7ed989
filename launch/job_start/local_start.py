"""One start on this machine: run its processes, relay signals to them, leave none of them behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from everstep.fault import OutOfMemoryCount, death_of
from everstep.launch.job_start.child import LEFT, Child, Command
from everstep.launch.job_start.ending_file import EndingFile
from everstep.launch.job_start.signals import Signals
from everstep.outcome import Ending, Outcome
from everstep.processes import children

SLACK_S = 10.0
"""Seconds beyond the grace period before a child is killed: torchrun first kills its own children."""
MARKER_S = 1.0
"""Seconds that writing the stop marker to a slow store may delay the signal to the child."""
PR_SET_CHILD_SUBREAPER = 36
MOST_SIGNALS = 64
HUNG = "the agent hung: its ranks had ended, and it had not"


class LeftAtOnce(Exception):
    """The user has asked a second time to stop: everything is killed and nothing is saved."""


class Local:
    """One child at a time, under one set of signals; `stopped` is the signal that asked it to stop.

    `agent`: commands are torchrun's (see `Command`). `relay` is False where the scheduler itself signals every process.
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
        """Ending of the last child if the run folder did not accept it, or if a process was killed."""
        self.idle_s = grace_s + SLACK_S
        self.killed = False
        """True if the last child was killed without a request to stop."""
        self._hung = False
        self.abandon: Callable[[], bool] = lambda: False
        """True as soon as the child is of no more use: it is then killed without a request to stop."""

    def run(self, argv: Sequence[str], env: Mapping[str, str], output: int | None = None) -> int:
        """Run a command to its end and return the exit code as a shell gives it.

        `output`: a file descriptor for all output; None is the caller's own.

        Raises:
            LeftAtOnce: the user has asked a second time to stop.
        """
        return self.run_child(lambda more: Command(argv, {**env, **more}, output, self.agent, self.idle_s))

    def run_child(self, start: Callable[[Mapping[str, str]], Child]) -> int:
        """Run the child that `start` starts, given environment variables; see `run`."""
        spared, memory = _adopt_orphans(), OutOfMemoryCount()
        with EndingFile() as ending:
            child = start(ending.environment())
            code = self._attend(child, spared)
            self.handed_over = ending.read()
        death = child.death(memory.since())
        if death is not None and (self.handed_over is None or self.handed_over.lost_peer):
            self.handed_over = death
        died = 128 < code <= 128 + MOST_SIGNALS and code != LEFT
        self.killed = self.handed_over is None and died and self.stopped is None
        if self.killed:
            reason = death_of(child.name, code - 128, memory.since())
            self.handed_over = Ending(Outcome.crashed, 0, HUNG if self._hung else reason)
        return code

    def _attend(self, child: Child, spared: set[int]) -> int:
        deadline = float("inf")
        try:
            while (code := child.poll()) is None:
                for number in self.signals.take():
                    if self.stopped is not None and number == signal.SIGINT:
                        raise LeftAtOnce
                    if self.stopped is None:
                        self._ask_to_stop(child, number)
                        deadline = time.monotonic() + self.grace_s + SLACK_S
                self._hung = child.is_hung()
                if time.monotonic() > deadline or self.abandon() or self._hung:
                    _kill(child, spared)
                _bury_orphans({child.pid, *child.spared()})
                self.signals.wait(min(1.0, max(0.0, deadline - time.monotonic())), child.descriptors())
        finally:
            _kill(child, spared)
        if child.reads and code == LEFT:
            raise LeftAtOnce
        return code

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

    def _ask_to_stop(self, child: Child, number: int) -> None:
        self.stopped = reason = signal.Signals(number).name
        # In a thread, as a store may hang: neither the signal below nor a second Ctrl-C must wait for it.
        writing = threading.Thread(target=self.leave_marker, args=(reason,), daemon=True)
        writing.start()
        writing.join(MARKER_S)
        if self.relay:
            child.stop()


def _adopt_orphans() -> set[int]:
    """Make processes whose parents die our children from now on; return our present descendants."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    return set(children(os.getpid(), recursive=True))


def _bury_orphans(awaited: set[int]) -> None:
    """Reap orphans that have ended: as process 1 of a container this process must do so.

    Children of our own threads are in our process group and the threads wait for them; those of the child are not.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(ChildProcessError, ProcessLookupError):  # there are none, or a thread was faster
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in awaited or os.getpgid(ended.si_pid) == os.getpgrp():
                return
            os.waitpid(ended.si_pid, 0)


def _kill(child: Child, spared: set[int]) -> None:
    """Send SIGKILL to the child and all its descendants: torchrun's workers have sessions of their own."""
    doomed = set(children(os.getpid(), recursive=True)) - spared - child.spared()
    child.kill()
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    for pid in doomed:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)

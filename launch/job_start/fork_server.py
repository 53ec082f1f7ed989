"""The fork server of this machine, as its launcher uses it (see trainer/fork_server.py)."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence

from everstep.fork_requests import Message, connected_pair, receive, send
from everstep.launch.job_start.child import has_terminal, leash

CLOSE_S = 10.0
"""Seconds in which the server ends once its socket is closed; then it is killed."""


class ForkServer:
    """A process that has imported what a rank imports. It stays over all starts of a run.

    Args:
        program: -m, a module and the ranks' arguments.
        env: environment of the server; a rank's differs by what `fork` is given.
        reads: True if one of its ranks may read from the terminal, and so stays in this process group.
    """

    def __init__(self, program: Sequence[str], env: Mapping[str, str], reads: bool) -> None:
        self.unfit: str | None = None
        """Reason why no process can be forked from it; empty if one can, None until that is known."""
        self.reads = reads
        self._control, theirs = connected_pair()
        argv = [sys.executable, *program[:2], "--fork-server", str(theirs.fileno()), *program[2:]]
        with theirs:
            self._process = subprocess.Popen(
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL if has_terminal() and not reads else None,
                process_group=None if reads else 0,
                pass_fds=[theirs.fileno()],
                preexec_fn=leash(os.getpid(), hangs_up=not reads),
            )
        self.pid = self._process.pid
        self.env = dict(env)
        self._gone = False

    @property
    def gone(self) -> bool:
        """True once the process has ended, or will accept no request."""
        return self._gone

    def descriptors(self) -> list[int]:
        return [] if self._gone else [self._control.fileno()]

    def fork(self, changes: Mapping[str, str | None], output: int | None) -> None:
        """Ask for a rank, whose environment has these changes; the answer is among the `messages`."""
        try:
            send(self._control, {"environment": dict(changes)}, output)
        except OSError:
            self._lose()

    def messages(self) -> list[Message]:
        """Return what the server has said about its processes since the last call."""
        said: list[Message] = []
        while not self._gone and select.select([self._control], [], [], 0)[0]:
            message, _ = receive(self._control)
            if message is None:
                self._lose()
            elif "ready" in message:
                self.unfit = str(message["ready"])
            else:
                said.append(message)
        return said

    def _lose(self) -> None:
        code = self._end()
        if self.unfit is None:
            self.unfit = f"its process ended with {code} before it was ready"

    def kill(self) -> None:
        """End the server and its ranks at once."""
        self._process.kill()
        self._end()

    def close(self) -> None:
        """End the server and with it all ranks."""
        if self.unfit is None:
            self._process.kill()  # it would see only after its imports that nobody listens
        self._end()

    def _end(self) -> int:
        """Close the socket, at which the server ends, and return its exit code."""
        self._gone = True
        self._control.close()
        try:
            return self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

"""The ranks of this machine in one start, forked by the fork server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from everstep.fault import WATCHDOG_SIGNAL, death_of
from everstep.launch.job_start.fork_server import ForkServer
from everstep.launch.job_start.other_nodes import OtherNodes
from everstep.outcome import Ending, Outcome
from everstep.processes import created_at
from everstep.rank_env import LOST_PEER, STALLED

LAST_WORDS_S = 0.25
"""Seconds that ranks have to say what they lost after a signal has killed another one."""
REPORT_S = 10.0
"""Seconds that ranks have to report a stall, which one of them has left already."""
KILL_S = 10.0
"""Seconds in which killed processes end."""
CHECK_S = 1.0
"""Seconds between two checks that ranks run."""


class RankGroup:
    """Ranks of this machine; see `Child`.

    After a signal has killed a rank, the others can only wait for it: they are killed after LAST_WORDS_S. One that ends
    with an error of its own leaves them `grace_s`, in which they may finish a checkpoint.

    Args:
        environments: environment of each rank, as changes to that of the fork server.
        output: a file descriptor for their output; None is this process's own.
        others: the other nodes of the start.
    """

    def __init__(
        self,
        server: ForkServer,
        environments: Sequence[Mapping[str, str | None]],
        output: int | None,
        grace_s: float,
        others: OtherNodes | None = None,
    ) -> None:
        self.server = server
        self.pid = server.pid
        self.alone = environments[0].get("WORLD_SIZE", "1") == "1"
        self.name = "rank 0" if self.alone else "the fork server"
        self.reads = server.reads
        self.grace_s = grace_s
        self._others = others
        self._environments = environments
        self._output = output
        self._pids: list[int] = []
        self._pidfds: dict[int, int] = {}
        """Descriptors of processes that run, by PID: a number alone may have passed to another process."""
        self._codes: dict[int, int] = {}
        """Exit codes by PID, in the order in which the processes ended; negative for a signal."""
        self._killed: set[int] = set()
        """Processes that were killed here."""
        self._asked = self._stopping = False
        self._kill_at = float("inf")
        self._unreported = float("inf")
        """Time at which all ranks had ended, as the kernel says, while the fork server had not reported it."""
        self._checked = 0.0

    def poll(self) -> int | None:
        for message in self.server.messages():
            self._note(message)
        if self.server.gone or self.server.unfit:
            return 128 + signal.SIGKILL
        if self._stopping and not self._asked:
            return 128 + signal.SIGTERM
        if self.server.unfit is None:
            return None
        if not self._asked:
            self._ask()
        if len(self._codes) == len(self._environments):
            return self._code()
        if self._others is not None and self._others.wait_s is not None:
            self._kill_in(self._others.wait_s)
        if time.monotonic() > self._kill_at:
            self._kill_living()
        return None

    def _kill_in(self, seconds: float) -> None:
        """Kill the ranks of this node in so many seconds, unless that comes sooner already."""
        self._kill_at = min(self._kill_at, time.monotonic() + seconds)

    def _ask(self) -> None:
        self._asked = True
        for environment in self._environments:
            self.server.fork(environment, self._output)

    def _note(self, message: Mapping[str, Any]) -> None:
        if "forked" in message:
            self._pids.append(message["forked"])
            if message["pidfd"] is not None:
                self._pidfds[message["forked"]] = message["pidfd"]
            if self._stopping:
                self._signal(message["forked"], signal.SIGTERM)
        elif message["ended"] in self._pids:
            self._codes[message["ended"]] = code = message["code"]
            self._forget(message["ended"])
            if code:
                wait_s = (
                    REPORT_S if code == STALLED else LAST_WORDS_S if code < 0 or code == LOST_PEER else self.grace_s
                )
                if self._others is not None and self._kill_at == float("inf"):
                    self._others.announce(wait_s)
                self._kill_in(wait_s)

    def descriptors(self) -> list[int]:
        waiting = self._others is not None and self._others.wait_s is None
        return self.server.descriptors() + ([self._others.descriptor] if self._others is not None and waiting else [])

    def savers(self) -> list[int]:
        return [pid for pid in self._pids if pid not in self._codes]

    def stop(self) -> None:
        self._stopping = True
        for pid in self.savers():
            self._signal(pid, signal.SIGTERM)

    def is_hung(self) -> bool:
        """True if all ranks ended longer ago than the grace period, and the fork server has not said so."""
        now = time.monotonic()
        if len(self._pids) == len(self._environments) and now - self._checked > CHECK_S:
            self._checked = now
            ended = not any(created_at(pid) for pid in self.savers())
            self._unreported = min(self._unreported, now) if ended else float("inf")
        return now - self._unreported > self.grace_s

    def kill(self) -> None:
        if self.is_hung():
            self.server.kill()
        deadline = time.monotonic() + KILL_S
        while self._asked and not self.server.gone and len(self._codes) < len(self._environments):
            for message in self.server.messages():
                self._note(message)
            self._kill_living()
            if time.monotonic() > deadline:
                self.server.kill()
            time.sleep(0.001)
        for pid in self._pids:
            self._forget(pid)

    def _kill_living(self) -> None:
        for pid in self.savers():
            self._killed.add(pid)
            self._signal(pid, signal.SIGKILL)

    def _forget(self, pid: int) -> None:
        if (descriptor := self._pidfds.pop(pid, None)) is not None:
            os.close(descriptor)

    def _signal(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if (descriptor := self._pidfds.get(pid)) is not None:
                signal.pidfd_send_signal(descriptor, number)
            else:
                os.kill(pid, number)

    def _first(self) -> tuple[int, int]:
        """Return rank and exit code of the process that failed first, not merely because of another; else 0."""
        failed = [(pid, code) for pid, code in self._codes.items() if code]
        if reported := [(pid, 1) for pid, code in failed if code == STALLED]:
            failed = reported  # what else has ended was killed for the stall
        own = [(pid, code) for pid, code in failed if code != LOST_PEER and pid not in self._killed]
        if self.alone:
            own = failed
        pid, code = own[0] if own else (self._pids[0], LOST_PEER if failed else 0)
        return int(self._environments[self._pids.index(pid)].get("RANK") or 0), code

    def _code(self) -> int:
        _, code = self._first()
        if self.alone:
            return code if code >= 0 else 128 - code
        # Several nodes stop one after another, and the scheduler takes any other code for a failure.
        return 0 if code == Outcome.preempted.exit_code else code if code >= 0 else 1

    def death(self, killed_for_memory: int) -> Ending | None:
        if self.alone or not self._codes or self.server.gone:
            return None
        rank, code = self._first()
        if code >= 0:
            return None
        several = self._environments[0].get("GROUP_WORLD_SIZE", "1") != "1"
        reason = death_of(f"rank {rank}{f' on {socket.gethostname()}' if several else ''}", -code, killed_for_memory)
        self._print(f"error: {reason}\n")
        return Ending(Outcome.stalled if -code == WATCHDOG_SIGNAL else Outcome.crashed, 0, reason, rank=rank)

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2 if self._output is None else self._output, line.encode())

    def spared(self) -> set[int]:
        return {self.server.pid}


def rank_environments(nproc: int, node: int = 0, nodes: int = 1) -> list[dict[str, str]]:
    """Return torchrun's variables for each process of this node; all nodes have `nproc`."""
    world = nproc * nodes
    return [
        {
            "RANK": str(node * nproc + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(nproc),
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(nodes),
        }
        for local in range(nproc)
    ]

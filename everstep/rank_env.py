"""Where a launcher put this process: its rank, and the agent that must not outlive it. No torch here."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from everstep.errors import MachineError

PR_SET_PDEATHSIG = 1
AGENT_PID = "EVERSTEP_AGENT_PID"
"""Environment variable: the process that started the ranks of this node. A rank without it ends at once."""
WORLD = "EVERSTEP_WORLD"
"""Environment variable: how many processes the launcher has asked for; a start with another number is refused."""


@dataclass(frozen=True)
class Place:
    """This process among all of its start."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    nodes: int = 1
    node: int = 0
    """Which of the nodes this is."""
    under_torchrun: bool = False

    @staticmethod
    def from_environment() -> Place:
        """What torchrun (or anybody who sets the same variables) says; alone without it."""
        env = os.environ
        return Place(
            int(env.get("RANK", "0")),
            int(env.get("WORLD_SIZE", "1")),
            int(env.get("LOCAL_RANK", "0")),
            int(env.get("GROUP_WORLD_SIZE", "1")),
            int(env.get("GROUP_RANK", "0")),
            "TORCHELASTIC_RUN_ID" in env,
        )

    def check_world(self) -> None:
        """Raise MachineError where fewer or more processes have met than the launcher has asked for."""
        asked = os.environ.get(WORLD, "")
        if asked.isdigit() and int(asked) != self.world:
            error = MachineError(
                f"{self.world} of {asked} processes have met: a node is missing, or its clock is minutes off; "
                f"a run of another size than was asked for is not started"
            )
            error.told = self.rank != 0
            raise error

    def started(self) -> datetime.datetime:
        """When this start began. Under torchrun the agent's start, so that a restarted worker finds its run again."""
        agent = Path(f"/proc/{os.getppid()}")
        if self.under_torchrun and agent.exists():
            return datetime.datetime.fromtimestamp(agent.stat().st_ctime)
        return datetime.datetime.now()


def die_with_parent() -> None:
    """Have the kernel kill this process when its agent dies: a worker without one trains on beside its successor.

    An agent that has died before is noticed by its id, which it hands over: `getppid` then names another process.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    agent = os.environ.get(AGENT_PID, "")
    if os.getppid() != parent or (agent.isdigit() and not _descends_from(int(agent))):
        os.kill(os.getpid(), signal.SIGKILL)


def _descends_from(ancestor: int) -> bool:
    """True if this process, or one that it comes from, was started by `ancestor`."""
    pid = os.getpid()
    while pid > 1:
        try:
            # The name, in parentheses, may hold anything; the parent is the second word after it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            return not Path("/proc/self/stat").exists()
        if pid == ancestor:
            return True
    return False

"""Where a launcher put this process: its rank, and the agent that must not outlive it. No torch here."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1


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

    def started(self) -> datetime.datetime:
        """When this start began. Under torchrun the agent's start, so that a restarted worker finds its run again."""
        agent = Path(f"/proc/{os.getppid()}")
        if self.under_torchrun and agent.exists():
            return datetime.datetime.fromtimestamp(agent.stat().st_ctime)
        return datetime.datetime.now()


def die_with_parent() -> None:
    """Have the kernel kill this process when its agent dies: a worker without one trains on beside its successor."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

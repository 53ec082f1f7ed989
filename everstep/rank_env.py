"""Environment of a rank under its launcher: its rank, and the agent it must not outlive. Torch-free."""

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
"""Environment variable: PID of the agent of this node's ranks. A rank without its agent ends at once."""
LOST_PEER = 69
"""Exit code of a rank that lost another one; the other's end is then reported as the reason."""
STALLED = 70
"""Exit code of a rank whose watchdog has reported a stall; the rank that is behind is then killed."""
WORLD = "EVERSTEP_WORLD"
"""Environment variable: world size requested by the launcher; a start with a different one is refused."""

HASH_SEED = "PYTHONHASHSEED"
"""Environment variable of Python: seed of the order in which sets of strings are iterated."""
FIXED_HASH_SEED = "0"


@dataclass(frozen=True)
class RankInfo:
    """Position of this process among all of its job start."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    nodes: int = 1
    node: int = 0
    """Index of this node."""
    under_torchrun: bool = False

    @staticmethod
    def from_environment() -> RankInfo:
        """Read the variables that torchrun sets; without them, a world of one process."""
        env = os.environ
        return RankInfo(
            int(env.get("RANK", "0")),
            int(env.get("WORLD_SIZE", "1")),
            int(env.get("LOCAL_RANK", "0")),
            int(env.get("GROUP_WORLD_SIZE", "1")),
            int(env.get("GROUP_RANK", "0")),
            "TORCHELASTIC_RUN_ID" in env,
        )

    def check_world(self) -> None:
        """Raise MachineError if the world size differs from the one that the launcher requested."""
        asked = os.environ.get(WORLD, "")
        if asked.isdigit() and int(asked) != self.world:
            error = MachineError(
                f"{self.world} of {asked} processes have met: a node is missing, or its clock is minutes off; "
                f"a run of another size than was asked for is not started"
            )
            error.told = self.rank != 0
            raise error

    def started(self) -> datetime.datetime:
        """Return the start time. Under torchrun it is the agent's, so that a restarted worker finds its run."""
        agent = Path(f"/proc/{os.getppid()}")
        if self.under_torchrun and agent.exists():
            return datetime.datetime.fromtimestamp(agent.stat().st_ctime)
        return datetime.datetime.now()


def fix_hash_seed() -> None:
    """Execute this interpreter again with a fixed hash seed, unless the environment names one.

    A model or vocabulary that is built from a set of strings would differ from rank to rank and from start to start.
    """
    if not os.environ.get(HASH_SEED):
        os.environ[HASH_SEED] = FIXED_HASH_SEED
        os.execv(sys.executable, sys.orig_argv)


def die_with_parent() -> None:
    """Have the kernel kill this process when its agent dies: an orphan would train beside its successor.

    The agent passes its PID, so that its earlier death is noticed: `getppid` then names another process.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    agent = os.environ.get(AGENT_PID, "")
    if os.getppid() != parent or (agent.isdigit() and not _descends_from(int(agent))):
        os.kill(os.getpid(), signal.SIGKILL)


def _descends_from(ancestor: int) -> bool:
    """True if `ancestor` started this process or one of its ancestors."""
    pid = os.getpid()
    while pid > 1:
        try:
            # The name, in parentheses, may contain anything; the parent is the second word after it.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            return not Path("/proc/self/stat").exists()
        if pid == ancestor:
            return True
    return False

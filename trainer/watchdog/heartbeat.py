"""Heartbeat: the message in which a rank tells the others that it lives, and where it is."""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import asdict, dataclass

from everstep.trainer.watchdog.activity import PATIENT, Mark, Phase

FIRST_FACTOR = 30.0
"""Factor on the limit of what is done for the first time."""


@dataclass(frozen=True)
class Process:
    """Process of a rank, as the other processes of its node can reach it."""

    host: str
    pid: int
    parent: int
    """PID of the agent, which the ranks of a node share."""
    main_thread: int
    """Identifier of the main thread in a dump of the stacks."""
    stacks: int
    """Descriptor of the file that a dump of the stacks goes to."""
    activity: int
    """Descriptor of the memory that holds the newest mark; -1 without one."""

    @staticmethod
    def own(stacks: int, activity: int) -> Process:
        main = threading.main_thread().ident or 0
        return Process(socket.gethostname(), os.getpid(), os.getppid(), main, stacks, activity)

    def is_beside(self, other: Process) -> bool:
        """True if both run on one node, under one agent."""
        return (self.host, self.parent) == (other.host, other.parent)


@dataclass(frozen=True)
class Heartbeat:
    beat: int
    """Number of the heartbeat; a rank whose number does not change is frozen."""
    phase: int
    step: int
    turn: int
    age_s: float
    """Seconds since the last mark, without those for which the whole process was suspended."""
    limit_s: float
    """Age from which on the rank counts as stalled."""
    process: Process
    has_left: bool = False
    """True if the rank has ended its part and is not watched any more."""
    own_s: float = 0.0
    passes: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """Order of progress: of ranks that wait for each other, the least keeps the others waiting."""
        return self.step, self.phase, self.turn

    @property
    def is_stalled(self) -> bool:
        return self.age_s > self.limit_s

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(data: bytes) -> Heartbeat:
        facts = json.loads(data)
        Phase(facts["phase"])
        return Heartbeat(**{**facts, "process": Process(**facts["process"])})


def limit_of(mark: Mark, stall_s: float) -> float:
    return stall_s * (FIRST_FACTOR if mark.fresh or mark.phase in PATIENT else 1.0)

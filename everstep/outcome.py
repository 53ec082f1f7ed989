"""Outcome of an attempt: why it ended, whose fault it was, and its record in the run folder."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from everstep.checked_json import LATEST, mapping, number, parse, text, whole

LONGEST = 1 << 20
"""Characters of a reason."""


class Outcome(enum.Enum):
    """Outcome of an attempt. It is recorded in a file because torchrun turns all exit codes into 1."""

    done = "done"
    preempted = "preempted"
    out_of_memory = "out_of_memory"
    diverged = "diverged"
    config_error = "config_error"
    superseded = "superseded"
    stalled = "stalled"
    """The watchdog has ended it: it got no further."""
    crashed = "crashed"

    @property
    def exit_code(self) -> int:
        return {"done": 0, "config_error": 2, "diverged": 3, "superseded": 4, "preempted": 75}.get(self.value, 1)


class Fault(enum.Enum):
    """Origin of a failure, for the restart policy."""

    machine = "machine"
    """A lost rank, a store, memory, a device, a signal: another start may succeed."""
    user = "user"
    """An exception of Python or torch: a bug, if before the first step or twice at one step."""
    left = "left"
    """The user has quit the debugger."""


@dataclass(frozen=True)
class Ending:
    """Outcome of an attempt, with facts for the next one and for the user."""

    outcome: Outcome
    step: int = 0
    reason: str = ""
    micro_batch: int | None = None
    """After out_of_memory: the size that the next attempt should use."""
    rank: int = 0
    """Rank that recorded the outcome."""
    time: float | None = field(default=None, compare=False)
    """Time of recording, in seconds since the epoch."""
    fault: Fault = Fault.machine
    error: str = ""
    """Type of the exception; empty without one."""
    place: str = ""
    """Line of the user's code that raised it."""
    lost_peer: bool = False
    """True if recorded by a rank that lost another one; the outcome of the lost rank replaces it."""
    patience: int | None = None
    """The `evaluate.patience` that ended the run before its last step."""
    node: str = ""
    """After stalled: host of the rank that kept the others waiting; empty if none was behind."""

    def repeats(self, earlier: Ending) -> bool:
        """True if both are the same error of the user's code at the same step."""
        both = (self, earlier)
        if any(each.fault is not Fault.user or each.outcome is not Outcome.crashed for each in both):
            return False
        mine, other = ((each.step, each.error, each.place or each.reason) for each in both)
        return mine == other

    def is_done(self, steps: int, patience: int | None) -> bool:
        """True if a run of so many steps, with this patience, has nothing left to do."""
        early = self.patience is not None and self.patience == patience
        return self.outcome is Outcome.done and (self.step >= steps or early)

    def to_json(self) -> bytes:
        return to_json_line({**asdict(self), "outcome": self.outcome.value, "fault": self.fault.value})

    @staticmethod
    def from_json(data: bytes) -> Ending:
        """Parse a record; ValueError, KeyError or TypeError unless `to_json` can have written it."""
        facts = mapping(parse(data), "it")
        fault = Fault(facts.get("fault", Fault.machine.value))
        for key in ("step", "rank", "micro_batch", "patience"):
            if facts.get(key) is not None:
                whole(facts[key], key)
        for key in ("reason", "error", "place", "node"):
            text(facts.get(key, ""), key, LONGEST)
        if facts.get("time") is not None:
            number(facts["time"], "time", 0, LATEST)
        return Ending(**{**facts, "outcome": Outcome(facts["outcome"]), "fault": fault})


def to_json_line(value: Any) -> bytes:
    """Return a value as JSON text with sorted keys and a line break at the end."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

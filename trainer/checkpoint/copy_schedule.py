"""Schedule of the automatic copies to the node tier: as often as a share of the time allows.

Rank 0 measures what a copy costs and plans the next one; all ranks follow its plan, since a copy is a collective.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

SHARE = 0.01
"""Largest share of the time that copies may cost."""
SHORTEST_S = 1.0
"""Seconds between copies at least: a restart costs as much as the steps of that time."""
FIRST_STEPS = 10
"""Steps of an attempt whose time is measured before the first copy is planned."""
RECENT_STEPS = 31
LARGEST_EXCESS = 2.0
"""Limit of what one step may add to the cost of a copy, in usual steps: more is an evaluation."""
WEIGHT = 0.5
"""Weight of the newest copy in the mean cost."""


@dataclass(frozen=True)
class Plan:
    """Decision of rank 0 about the next copy."""

    next_step: int
    apart: int
    """Steps between copies."""


class CopySchedule:
    """Measured times of one rank, and the plan that all ranks share."""

    def __init__(self, every: int) -> None:
        """`every` is the number of steps between checkpoints in the run folder, which need no copy."""
        self.every = every
        self.plan: Plan | None = None
        """None until the first steps are measured."""
        self._first: int | None = None
        self._usual = deque[float](maxlen=RECENT_STEPS)
        self._excess_s = 0.0
        self._cost_s: float | None = None

    def due(self, step: int) -> bool:
        """True if a copy is due, or its plan; the same on all ranks."""
        if self._first is None:
            self._first = step
        return step >= (self.plan.next_step if self.plan is not None else self._first + FIRST_STEPS)

    def step_took(self, seconds: float, copying: bool) -> None:
        """Account for a step, which a copy went on beside or not."""
        if not copying:
            self._usual.append(seconds)
        elif self._usual:
            usual = median(self._usual)
            self._excess_s += min(seconds - usual, LARGEST_EXCESS * usual)

    def copied(self, stall_s: float) -> None:
        """Account for a copy that has ended, and for which training stood still."""
        cost_s = stall_s + max(0.0, self._excess_s)
        before = cost_s if self._cost_s is None else self._cost_s
        self._cost_s, self._excess_s = before + WEIGHT * (cost_s - before), 0.0

    def next_plan(self, step: int) -> Plan:
        """Return the plan after `step`, by what this rank has measured.

        A copy shortly before a checkpoint of the run folder is left out.
        """
        step_s = median(self._usual) if self._usual else SHORTEST_S
        apart = max(1, math.ceil(max(SHORTEST_S, (self._cost_s or 0.0) / SHARE) / max(step_s, 1e-6)))
        checkpoint = (step // self.every + 1) * self.every
        return Plan(step + apart if checkpoint - step >= 1.5 * apart else checkpoint, apart)

    def saved(self, step: int) -> None:
        """Count from a checkpoint of the run folder."""
        if self.plan is not None:
            self.plan = Plan(step + self.plan.apart, self.plan.apart)

"""Which trial may go on to a larger budget: pure, from the results at each rung.

A rung is a budget. A trial trains up to its first rung; of those that have come to a rung, the best one in `eta` goes
on from its checkpoint to the next. Nobody waits for those that still train (ASHA): the best so far are good enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everstep.config import RunConfig
from everstep.launch.sweep.config import RUNGED, Budget, Pruner, SweepConfig

Losses = Mapping[int, Sequence[float]]
"""Trial → what it had at its first rung, its second …: smaller is better, infinite where it came to nothing."""


@dataclass(frozen=True)
class Promotion:
    trial: int
    rung: int


def rungs(sweep: SweepConfig, run: RunConfig) -> tuple[int, ...]:
    """The steps of each rung for one trial, the last of which is the whole run."""
    if sweep.pruner not in RUNGED:
        return (run.steps,)
    if sweep.rungs is None:
        return tuple(sorted({math.ceil(run.steps / sweep.eta**power) for power in (2, 1, 0)}))
    samples = {Budget.steps: run.global_batch, Budget.samples: 1, Budget.epochs: sweep.epoch_samples or 1}
    return tuple(max(1, math.ceil(each * samples[sweep.budget] / run.global_batch)) for each in sweep.rungs)


def first_rung(sweep: SweepConfig, count: int, trial: int) -> int:
    """Where a trial begins. Hyperband hedges: of its brackets each begins a rung higher, and with fewer trials."""
    if sweep.pruner is not Pruner.hyperband:
        return 0
    shares = [math.ceil(count / (above + 1) * sweep.eta**above) for above in range(count)]
    cycle = [rung for rung in range(count) for _ in range(shares[count - 1 - rung])]
    return cycle[trial % len(cycle)]


def promotion(
    losses: Losses, eta: int, count: int, first: Mapping[int, int], under_way: frozenset[int] = frozenset()
) -> Promotion | None:
    """The next trial to go on, of the highest rung that has one; None when nobody has earned it.

    Args:
        count: rungs in all.
        first: the rung at which each trial has begun; those of one beginning are held to each other.
        under_way: trials that have been sent on already, and have not come to their next rung.
    """
    for bracket in sorted(set(first.values())):
        members = {trial: seen for trial, seen in losses.items() if first[trial] == bracket}
        for rung in range(count - 2, bracket - 1, -1):
            here = [(seen[rung - bracket], trial) for trial, seen in members.items() if len(seen) > rung - bracket]
            for loss, trial in sorted(here)[: len(here) // eta]:
                stands_here = len(members[trial]) == rung - bracket + 1 and trial not in under_way
                if stands_here and loss < math.inf:
                    return Promotion(trial, rung + 1)
    return None


def finalist(losses: Losses, count: int, first: Mapping[int, int]) -> Promotion | None:
    """When nobody else goes on: the best of those that have come farthest, until one has come to the last rung.

    A sweep of few trials would else end without a run of full length.
    """
    reached = {trial: first[trial] + len(seen) - 1 for trial, seen in losses.items() if seen and seen[-1] < math.inf}
    if not reached or max(reached.values()) == count - 1:
        return None
    farthest = max(reached.values())
    best = min((losses[trial][-1], trial) for trial, rung in reached.items() if rung == farthest)[1]
    return Promotion(best, farthest + 1)

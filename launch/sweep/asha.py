"""Decisions about a trial from results so far: promotion to a larger budget, or its end; pure.

A rung is a budget. A trial trains up to its first rung; of the trials that have reached a rung, the best one in `eta`
continues from its checkpoint to the next. Promotion is asynchronous (ASHA): it never waits for trials that still
train, but ranks those that have results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everstep.config import UNRESOLVED, RunConfig
from everstep.errors import ConfigError
from everstep.launch.sweep.config import RUNGED, Budget, Pruner, SweepConfig

Losses = Mapping[int, Sequence[float]]
"""Trial → its loss at each rung from its first on: smaller is better, infinite without a result."""


@dataclass(frozen=True)
class Promotion:
    trial: int
    rung: int


def rungs(sweep: SweepConfig, run: RunConfig) -> tuple[int, ...]:
    """Return the steps of each rung for one trial; the last is the length of the whole run."""
    if run.steps == UNRESOLVED:
        raise ConfigError(f"steps={run.steps_given}: the trials of a sweep have a number of steps; write one")
    if sweep.pruner not in RUNGED:
        return (run.steps,)
    if sweep.rungs is None:
        return tuple(sorted({math.ceil(run.steps / sweep.eta**power) for power in (2, 1, 0)}))
    samples = {Budget.steps: run.global_batch, Budget.samples: 1, Budget.epochs: sweep.epoch_samples or 1}
    return tuple(max(1, math.ceil(each * samples[sweep.budget] / run.global_batch)) for each in sweep.rungs)


def first_rung(sweep: SweepConfig, count: int, trial: int) -> int:
    """Return the first rung of a trial.

    Hyperband hedges with brackets: each begins one rung higher than the one before and has fewer trials.
    """
    if sweep.pruner is not Pruner.hyperband:
        return 0
    shares = [math.ceil(count / (above + 1) * sweep.eta**above) for above in range(count)]
    cycle = [rung for rung in range(count) for _ in range(shares[count - 1 - rung])]
    return cycle[trial % len(cycle)]


def promotion(
    losses: Losses, eta: int, count: int, first: Mapping[int, int], under_way: frozenset[int] = frozenset()
) -> Promotion | None:
    """Return the next trial to promote, from the highest rung that has one; None when none qualifies.

    Args:
        count: rungs in all.
        first: the first rung of each trial; only trials with the same first rung are compared.
        under_way: trials that are promoted already and have not reached their next rung.
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
    """Return the best of the trials that have come farthest, unless one has reached the last rung.

    Used when no promotion is due and nothing runs. A sweep of few trials would otherwise end without a full-length run.
    """
    reached = {trial: first[trial] + len(seen) - 1 for trial, seen in losses.items() if seen and seen[-1] < math.inf}
    if not reached or max(reached.values()) == count - 1:
        return None
    farthest = max(reached.values())
    best = min((losses[trial][-1], trial) for trial, rung in reached.items() if rung == farthest)[1]
    return Promotion(best, farthest + 1)


Curve = Mapping[int, float]
"""Step → loss, smaller is better."""


def reason_to_stop(sweep: SweepConfig, curve: Curve, others: Sequence[Curve]) -> str | None:
    """Return the reason to stop a trial with this curve now; None to continue."""
    if not curve:
        return None
    if sweep.pruner is Pruner.median:
        return _below_median(sweep, curve, others)
    return _out_of_patience(sweep, curve) if sweep.pruner is Pruner.patience else None


def _below_median(sweep: SweepConfig, curve: Curve, others: Sequence[Curve]) -> str | None:
    step = max(curve)
    past = [best_until(other, step) for other in others if other and max(other) >= step]
    if len(past) < sweep.warmup_trials:
        return None
    median, own = statistics.median(past), best_until(curve, step)
    return f"worse than the median of {len(past)} at step {step}" if own > median else None


def _out_of_patience(sweep: SweepConfig, curve: Curve) -> str | None:
    steps = sorted(curve)
    best = min(steps, key=lambda step: (_finite(curve[step]), step))
    stale = len(steps) - 1 - steps.index(best)
    return f"nothing better since step {best}" if stale >= sweep.patience else None


def best_until(curve: Curve, step: int) -> float:
    return min((_finite(loss) for at, loss in curve.items() if at <= step), default=math.inf)


def _finite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss

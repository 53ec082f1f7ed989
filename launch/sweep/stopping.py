"""Early stopping of running trials: pure functions of the loss curves of all trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from everstep.launch.sweep.config import Pruner, SweepConfig

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

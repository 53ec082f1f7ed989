"""First lines of a report: one sentence that says what happened, and six figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.launch.console import duration, number
from everstep.launch.report.attempts import AttemptRow

LONGEST_REASON = 90
SHORTEST_S = 300.0
"""Seconds of a run from which on the sentence tells its goodput; before, the start is most of it."""


@dataclass(frozen=True)
class Figure:
    """One of the six figures."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Best:
    """The best value of `evaluate.metric`."""

    metric: str
    value: float
    step: int


def best_of(figures: Mapping[str, float], metric: str) -> Best | None:
    """Return the best of what `everstep compare` computes; None without an evaluation."""
    value, step = figures.get(f"best/{metric}"), figures.get("best/step")
    return None if value is None or step is None else Best(metric, float(value), int(step))


def sentence(status: Mapping[str, Any], attempts: Sequence[AttemptRow], best: Best | None) -> str:
    """Return one sentence: state, time, goodput, restarts with their reasons, best metric."""
    spent = status["goodput"]
    went = f"{_state(status)} in {duration(spent['wall_s'])}" if status["attempt"] else _state(status)
    said = [
        went,
        f"{spent['fraction']:.1%} of the time productive" if spent["wall_s"] >= SHORTEST_S else "",
        _restarts(attempts),
        f"best {best.metric} {number(best.value)} at step {best.step:,}" if best is not None else "",
    ]
    return "; ".join(filter(None, said)) + "."


def _state(status: Mapping[str, Any]) -> str:
    step, steps = status["step"], status["steps"]
    at = f" at step {step:,}" + (f" of {steps:,}" if steps and steps != step else "") if step is not None else ""
    return f"{str(status['state']).capitalize()}{at}"


def _restarts(attempts: Sequence[AttemptRow]) -> str:
    """Return how often the run was started again, and after what."""
    if len(attempts) < 2:
        return ""
    causes = Counter(_cause(each) for each in attempts[:-1])
    times = {1: "once", 2: "twice"}.get(len(attempts) - 1, f"{len(attempts) - 1} times")
    told = [f"{count} × {cause}" if count > 1 else cause for cause, count in causes.most_common(3)]
    more = f" and {len(causes) - 3} other causes" if len(causes) > 3 else ""
    return f"started again {times}: {', '.join(told)}{more}"


def _cause(attempt: AttemptRow) -> str:
    said = (attempt.reason or attempt.decision or attempt.outcome).split("; ")[0]
    return said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}…"


def figures(status: Mapping[str, Any], attempts: Sequence[AttemptRow], best: Best | None) -> list[Figure]:
    """Return the six figures, all from `everstep status --json` and `everstep compare`."""
    spent, step, steps = status["goodput"], status["step"], status["steps"]
    replayed = spent["replayed_steps"]
    rate = f"{status['steps_per_s']:.3g} steps/s" if status["steps_per_s"] else ""
    return [
        Figure("state", str(status["state"]), str(status["why"] or "")[:LONGEST_REASON]),
        Figure("steps", "none" if step is None else f"{step:,}", f"of {steps:,}" if steps else ""),
        Figure("goodput", f"{spent['fraction']:.1%}", "productive share of the wall time"),
        _metric(status, best),
        Figure("wall time", duration(spent["wall_s"]), rate),
        Figure("steps replayed", f"{replayed:,}", f"in {_attempts(len(attempts))}"),
    ]


def _metric(status: Mapping[str, Any], best: Best | None) -> Figure:
    if best is not None:
        return Figure(f"best {best.metric}", number(best.value), f"at step {best.step:,}")
    value = status["value"]
    return Figure(str(status["metric"]), "none" if value is None else number(float(value)), "the last one recorded")


def _attempts(count: int) -> str:
    return "1 attempt" if count == 1 else f"{count} attempts"

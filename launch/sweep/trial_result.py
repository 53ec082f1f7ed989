"""Result of a trial, read from its run's own metrics: training code needs no changes for a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from everstep.errors import EverstepError
from everstep.launch.runs.history import NotARun, read
from everstep.launch.runs.state import RunState
from everstep.launch.runs.summary import line
from everstep.launch.schedulers.job import JobStatus
from everstep.launch.sweep.state import Told, Verdict
from everstep.launch.sweep.workers import Ended
from everstep.run_folder import METRICS, Outcome, RunFolder


def evaluations(folder: RunFolder, kind: str = "evaluate") -> dict[int, dict[str, Any]]:
    """Return the last record of each step, in the order of steps."""
    records = (record for attempt in folder.attempts() for record in folder.lines(attempt, METRICS))
    return dict(sorted({record["step"]: record for record in records if record.get("kind") == kind}.items()))


def curve(folder: RunFolder, metric: str) -> dict[int, float]:
    """Return step → one metric, for the steps evaluated so far."""
    return {step: float(record[metric]) for step, record in evaluations(folder).items() if metric in record}


def result(ended: Ended, metrics: Sequence[str], cut: str | None) -> Told | None:
    """Return the result of a task that has ended; None when it was interrupted and is to be restarted."""
    folder = ended.task.folder
    try:
        history = read(folder)
    except NotARun:
        return None  # never started
    except EverstepError as error:
        return Told(Verdict.failed, reason=str(error))
    here = line(history, ended.job)
    state, why = here.standing.state, here.standing.why
    ending = history.last.ending if history.last else None
    step = ending.step if ending is not None else 0
    if ending is not None and ending.outcome is Outcome.done:
        # A later attempt had nothing to do; with fewer steps, this is the outcome of an earlier rung.
        return _value(folder, metrics, Verdict.done, step, why) if step >= ended.task.config.steps else None
    if ending is not None and ending.outcome is Outcome.diverged:
        return Told(Verdict.diverged, (math.nan,) * len(metrics), step, ending.reason)
    if state is RunState.cancelled:
        return Told(Verdict.cancelled, (), step, why)
    if cut is not None and state in (RunState.stopped, RunState.lost):
        return _value(folder, metrics, Verdict.pruned, step, cut)
    if state is RunState.failed:
        return Told(Verdict.failed, (), step, why)
    if state is RunState.new and ended.code not in (None, 0) and (ended.code or 0) > 0:
        return Told(Verdict.failed, (), 0, ended.said or f"exit code {ended.code}")
    return None


def _value(folder: RunFolder, metrics: Sequence[str], verdict: Verdict, step: int, reason: str) -> Told:
    """Return the last evaluation as a result; a trial without the metrics has failed."""
    found = evaluations(folder)
    last = {name: float(record[name]) for record in found.values() for name in metrics if name in record}
    missing = [name for name in metrics if name not in last]
    if missing and verdict is not Verdict.pruned:
        measured = sorted({key for record in found.values() for key in record} - {"kind", "step", "time"})
        told = ", ".join(measured) if measured else "no evaluation at all"
        reason = f"no metric {', '.join(missing)} (there is {told}); change sweep.metric"
        return Told(Verdict.failed, (), step, reason)
    return Told(verdict, tuple(last.get(name, math.nan) for name in metrics), step, reason)


def is_alive(folder: RunFolder, job: JobStatus | None = None) -> bool:
    """True if a process or job of another launcher still works on the trial.

    A silent run on another machine counts as dead; if it is alive, its next save fails as superseded.
    """
    try:
        state = line(read(folder), job).standing.state
    except EverstepError:
        return False
    return not state.is_over and state not in (RunState.new, RunState.silent)

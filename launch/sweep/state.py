"""State of a sweep, replayed from its records, and results of trials, read from their metrics."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.config import Goal
from everstep.errors import EverstepError
from everstep.launch.runs.history import NotARun, read
from everstep.launch.runs.state import RunState
from everstep.launch.runs.summary import line
from everstep.launch.schedulers.job import JobStatus
from everstep.launch.sweep.workers import EndedTrial
from everstep.outcome import Outcome
from everstep.run_folder import METRICS, RunFolder


class TrialOutcome(enum.Enum):
    """Outcome of a trial at a rung."""

    done = "done"
    diverged = "diverged"
    """NaN or Inf for too long: counts as the worst result."""
    pruned = "pruned"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def is_final(self) -> bool:
        return self is not TrialOutcome.done


@dataclass(frozen=True)
class RungResult:
    """Result of a trial at one rung."""

    verdict: TrialOutcome
    values: tuple[float, ...] = ()
    step: int = 0
    reason: str = ""


@dataclass
class Trial:
    """One set of values, and its results."""

    number: int
    identity: str
    name: str
    values: dict[str, Any]
    drawn: dict[str, Any]
    """Values from the sampler, before the constraint."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Sampler attributes to replay, such as NSGA-II's generation."""
    first: int = 0
    """Its first rung."""
    rung: int = 0
    """The rung that it trains to."""
    told: dict[int, RungResult] = field(default_factory=dict)
    cut: str | None = None
    """Reason for which it was stopped early."""
    again: int = 0
    """Retries after a failure or cancellation."""

    @property
    def last(self) -> RungResult | None:
        return self.told[max(self.told)] if self.told else None

    @property
    def is_open(self) -> bool:
        """True while training remains to be done."""
        return self.rung not in self.told and not (self.last is not None and self.last.verdict.is_final)

    def losses(self, goals: Sequence[Goal]) -> list[float]:
        """Return the first metric at each rung as a loss (smaller is better); infinite without a value."""
        return [
            loss(told.values[0], goals[0]) if told.values and told.verdict is not TrialOutcome.cancelled else math.inf
            for _, told in sorted(self.told.items())
        ]


def loss(value: float, goal: Goal) -> float:
    """Return the metric as a loss: smaller is better, NaN is the worst."""
    return math.inf if math.isnan(value) else value if goal is Goal.min else -value


@dataclass
class SweepState:
    """All trials, by number."""

    trials: list[Trial] = field(default_factory=list)
    length: int = 0
    """Records so far; the next record has this number."""
    identities: dict[str, Trial] = field(default_factory=dict)
    order: list[tuple[Trial, RungResult | None]] = field(default_factory=list)
    """Events for a sampler, in order: a suggested trial (None), or a trial with its result."""

    @staticmethod
    def of(records: Iterable[Mapping[str, Any]]) -> SweepState:
        story = SweepState()
        for record in records:
            story.apply(record)
        return story

    def apply(self, record: Mapping[str, Any]) -> None:
        self.length += 1
        getattr(self, f"_{record['event']}")(record)

    def _asked(self, record: Mapping[str, Any]) -> None:
        trial = Trial(
            len(self.trials),
            record["identity"],
            record["name"],
            dict(record["values"]),
            dict(record["drawn"]),
            dict(record.get("attributes", {})),
            record.get("rung", 0),
            record.get("rung", 0),
        )
        self.trials.append(trial)
        self.identities[trial.identity] = trial
        self.order.append((trial, None))

    def _told(self, record: Mapping[str, Any]) -> None:
        trial = self.trials[record["trial"]]
        values = tuple(math.nan if value is None else float(value) for value in record.get("values", ()))
        told = RungResult(TrialOutcome(record["verdict"]), values, record["step"], record.get("reason", ""))
        trial.told[record["rung"]] = told
        self.order.append((trial, told))

    def _promoted(self, record: Mapping[str, Any]) -> None:
        self.trials[record["trial"]].rung = record["rung"]

    def _cut(self, record: Mapping[str, Any]) -> None:
        self.trials[record["trial"]].cut = record["reason"]

    def _again(self, record: Mapping[str, Any]) -> None:
        """Reopen a failed or cancelled trial."""
        trial = self.trials[record["trial"]]
        trial.told.pop(trial.rung, None)
        trial.again += 1

    @property
    def failures(self) -> int:
        return sum(trial.last is not None and trial.last.verdict is TrialOutcome.failed for trial in self.trials)


def evaluations(folder: RunFolder, kind: str = "evaluate") -> dict[int, dict[str, Any]]:
    """Return the last record of each step, in the order of steps."""
    records = (record for attempt in folder.attempts() for record in folder.lines(attempt, METRICS))
    return dict(sorted({record["step"]: record for record in records if record.get("kind") == kind}.items()))


def curve(folder: RunFolder, metric: str) -> dict[int, float]:
    """Return step → one metric, for the steps evaluated so far."""
    return {step: float(record[metric]) for step, record in evaluations(folder).items() if metric in record}


def result(ended: EndedTrial, metrics: Sequence[str], cut: str | None) -> RungResult | None:
    """Return the result of a task that has ended; None when it was interrupted and is to be restarted."""
    folder = ended.task.folder
    try:
        history = read(folder)
    except NotARun:
        return None  # never started
    except EverstepError as error:
        return RungResult(TrialOutcome.failed, reason=str(error))
    here = line(history, ended.job)
    state, why = here.standing.state, here.standing.why
    ending = history.last.ending if history.last else None
    step = ending.step if ending is not None else 0
    if ending is not None and ending.outcome is Outcome.done:
        # A later attempt had nothing to do; with fewer steps, this is the outcome of an earlier rung.
        return _value(folder, metrics, TrialOutcome.done, step, why) if step >= ended.task.config.steps else None
    if ending is not None and ending.outcome is Outcome.diverged:
        return RungResult(TrialOutcome.diverged, (math.nan,) * len(metrics), step, ending.reason)
    if state is RunState.cancelled:
        return RungResult(TrialOutcome.cancelled, (), step, why)
    if cut is not None and state in (RunState.stopped, RunState.lost):
        return _value(folder, metrics, TrialOutcome.pruned, step, cut)
    if state is RunState.failed:
        return RungResult(TrialOutcome.failed, (), step, why)
    if state is RunState.new and ended.code not in (None, 0) and (ended.code or 0) > 0:
        return RungResult(TrialOutcome.failed, (), 0, ended.said or f"exit code {ended.code}")
    return None


def _value(folder: RunFolder, metrics: Sequence[str], verdict: TrialOutcome, step: int, reason: str) -> RungResult:
    """Return the last evaluation as a result; a trial without the metrics has failed."""
    found = evaluations(folder)
    last = {name: float(record[name]) for record in found.values() for name in metrics if name in record}
    missing = [name for name in metrics if name not in last]
    if missing and verdict is not TrialOutcome.pruned:
        measured = sorted({key for record in found.values() for key in record} - {"kind", "step", "time"})
        told = ", ".join(measured) if measured else "no evaluation at all"
        reason = f"no metric {', '.join(missing)} (there is {told}); change sweep.metric"
        return RungResult(TrialOutcome.failed, (), step, reason)
    return RungResult(verdict, tuple(last.get(name, math.nan) for name in metrics), step, reason)


def is_alive(folder: RunFolder, job: JobStatus | None = None) -> bool:
    """True if a process or job of another launcher still works on the trial.

    A silent run on another machine counts as dead; if it is alive, its next save fails as superseded.
    """
    try:
        state = line(read(folder), job).standing.state
    except EverstepError:
        return False
    return not state.is_over and state not in (RunState.new, RunState.silent)

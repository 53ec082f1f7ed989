"""Goodput of a run: from the records of its folder to the parts that its wall time is divided into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from everstep.launch.runs.history import READERS, Attempt, History
from everstep.launch.runs.record_types import one_line
from everstep.launch.schedulers.job import JobStatus
from everstep.run_folder import EVENTS, METRICS, RunFolder

PRODUCTIVE, QUEUE, START, REPLAYED = "productive", "queue", "start", "replayed"
CHECKPOINT, EVALUATION, DATA_WAIT, STALLED, DOWN = "checkpoint", "evaluation", "data wait", "stalled", "down"
PARTS = {
    PRODUCTIVE: "steps that count",
    QUEUE: "from the submission, or the decision to start again, to the start of the job",
    START: "from there to the end of the first step",
    REPLAYED: "steps done again after a restart",
    CHECKPOINT: "training stood still for a save",
    EVALUATION: "on held-out data",
    DATA_WAIT: "the step waited for its samples",
    STALLED: "nothing got further, until the watchdog ended the attempt",
    DOWN: "nothing ran, and nothing was asked to run",
}


TICK_S = 1.0
"""Tolerance for schedulers that count whole seconds: a job may seem to start before it was submitted."""


@dataclass(frozen=True)
class Pause:
    """Interruption of training that ends at `at` (seconds since the epoch)."""

    part: str
    at: float
    seconds: float


@dataclass(frozen=True)
class Stretch:
    """Time span of one attempt. All moments are seconds since the epoch."""

    began: float
    ended: float
    """Its end, or its last record."""
    first_step: float | None = None
    """End of its first step; None when no step was done."""
    caught_up: float | None = None
    """Time at which it reached the step of the attempts before; None when there was nothing to replay."""
    pauses: Sequence[Pause] = ()


@dataclass(frozen=True)
class Timeline:
    """Input of the goodput computation."""

    since: float
    """First submission or start of the run."""
    until: float
    """Now, or the end of the run."""
    stretches: Sequence[Stretch] = ()
    asked: Sequence[float] = ()
    """Requests for nodes: submissions, and decisions to restart."""
    given: Sequence[float] = ()
    """Times at which the scheduler gave nodes, as far as known."""
    replayed_steps: int = 0


@dataclass(frozen=True)
class Span:
    """Part of the wall time, from `since` to `until` (seconds since the epoch)."""

    part: str
    since: float
    until: float


@dataclass(frozen=True)
class Goodput:
    """Seconds by part."""

    parts: dict[str, float] = field(default_factory=dict)
    replayed_steps: int = 0
    spans: Sequence[Span] = ()
    """The whole wall time in order; pauses of training lie within its productive spans."""
    pauses: Sequence[Pause] = ()

    @property
    def wall_s(self) -> float:
        return sum(self.parts.values())

    @property
    def fraction(self) -> float:
        """Return productive time over wall time, from 0 to 1."""
        return self.parts.get(PRODUCTIVE, 0.0) / self.wall_s if self.wall_s > 0 else 0.0


class _Cuts:
    """Divides the wall time into consecutive parts, so that no second is counted twice or left out."""

    def __init__(self, since: float, until: float) -> None:
        self.at, self.until = since, max(since, until)
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.spans: list[Span] = []

    def cut(self, part: str, until: float) -> None:
        """Assign the time from the last cut up to `until` to `part`."""
        until = min(max(until, self.at), self.until)
        self.parts[part] += until - self.at
        self._move(part, until)

    def _move(self, part: str, until: float) -> None:
        if until > self.at:
            self.spans.append(Span(part, self.at, until))
        self.at = until

    def share(self, until: float, wanted: Iterator[tuple[str, float]], rest: str) -> None:
        """Split the time up to `until`: to each part in `wanted` its seconds while any remain, then to `rest`."""
        room = min(max(until, self.at), self.until) - self.at
        self._move(rest, self.at + room)
        for part, seconds in wanted:
            taken = min(room, max(0.0, seconds))
            self.parts[part] += taken
            room -= taken
        self.parts[rest] += room


def goodput(timeline: Timeline) -> Goodput:
    """Assign every second between `since` and `until` to one part."""
    cuts = _Cuts(timeline.since, timeline.until)
    ordered = sorted(timeline.stretches, key=lambda stretch: stretch.began)
    for number, stretch in enumerate(ordered):
        _wait(cuts, timeline, stretch.began)
        # A superseded attempt may have run on beside its successor; its time counts until the successor began.
        successor = ordered[number + 1].began if number + 1 < len(ordered) else timeline.until
        _work(cuts, stretch, min(stretch.ended, successor))
    _wait(cuts, timeline, timeline.until)
    pauses = [pause for stretch in ordered for pause in stretch.pauses]
    return Goodput(cuts.parts, timeline.replayed_steps, cuts.spans, pauses)


def _wait(cuts: _Cuts, timeline: Timeline, until: float) -> None:
    """Divide the time between two attempts."""
    since = next((moment for moment in sorted(timeline.asked) if cuts.at <= moment <= until), None)
    if since is None:
        cuts.cut(DOWN, until)
        return
    cuts.cut(DOWN, since)
    cuts.cut(QUEUE, next((moment for moment in sorted(timeline.given) if since - TICK_S <= moment <= until), until))
    cuts.cut(START, until)


def _work(cuts: _Cuts, stretch: Stretch, ended: float) -> None:
    if stretch.first_step is None:
        cuts.cut(START, ended)
        return
    cuts.cut(START, min(stretch.first_step, ended))
    if stretch.caught_up is not None:
        cuts.cut(REPLAYED, min(stretch.caught_up, ended))
    since = cuts.at
    cuts.share(ended, ((p.part, p.seconds) for p in stretch.pauses if since < p.at <= ended), PRODUCTIVE)


Record = dict[str, Any]


@dataclass(frozen=True)
class Account:
    """Records of one attempt."""

    attempt: Attempt
    events: Sequence[Record]
    steps: Sequence[Record]
    """Its training records, in the order of writing."""
    start_step: int

    @property
    def reached(self) -> int:
        """Return the highest step recorded as done."""
        ending = self.attempt.ending
        told = [int(record["step"]) for record in (*self.events, *self.steps) if "step" in record]
        return max(told + ([ending.step] if ending else []), default=self.start_step)

    @property
    def last_sign(self) -> float:
        ending = self.attempt.ending
        if ending is not None and ending.time:
            return ending.time
        return max(
            [float(record.get("time") or 0.0) for record in (*self.events, *self.steps)] + [self.attempt.claimed_at]
        )


def timeline(folder: RunFolder, history: History, job: JobStatus | None, until: float | None) -> Timeline:
    """Return the timeline of a run.

    Args:
        until: now for a run that is under way; None for one that is over, which ends at its last record.
    """
    with one_line(folder):
        return _timeline(folder, history, job, until)


def _timeline(folder: RunFolder, history: History, job: JobStatus | None, until: float | None) -> Timeline:
    with ThreadPoolExecutor(READERS) as pool:
        accounts = list(pool.map(lambda attempt: account(folder, attempt), history.attempts))
    last_sign = max([each.last_sign for each in accounts] + [each.at for each in history.submissions], default=0.0)
    decided = [float(each["time"]) for each in history.decisions if each.get("time")]
    end = max([last_sign, *decided]) if until is None else until
    stretches, passed, replayed = [], 0, 0
    for each in accounts:
        running = until is not None and each is accounts[-1] and each.attempt.ending is None
        ended = end if running else each.last_sign
        stretches.append(_stretch(each, ended, passed))
        replayed += max(0, min(passed, each.reached) - each.start_step)
        passed = max(passed, each.reached)
    scheduled = bool(history.submissions)
    restarts = [float(each["time"]) for each in history.decisions if each.get("go_on") and each.get("time")]
    asked = [each.at for each in history.submissions] + (restarts if scheduled else [])
    given = [each.at for each in history.starts] + ([job.started_at] if job is not None and job.started_at else [])
    return Timeline(history.started_at or end, end, stretches, asked, given, replayed)


def account(folder: RunFolder, attempt: Attempt) -> Account:
    events = list(folder.lines(attempt.number, EVENTS))
    metrics = [record for record in folder.lines(attempt.number, METRICS) if record.get("kind") == "train"]
    restored = folder.facts(folder.attempt(attempt.number, "restored.json"))
    return Account(attempt, events, metrics, int(restored.get("step") or 0))


def _stretch(account: Account, ended: float, passed: int) -> Stretch:
    first = next((float(event["time"]) for event in account.events if event.get("event") == "first_step"), None)
    if first is None and account.steps:
        first = float(account.steps[0]["time"])
    return Stretch(
        account.attempt.began_at,
        ended,
        first,
        _caught_up(account, first, passed, ended),
        [*_pauses(account)],
    )


def _caught_up(account: Account, first: float | None, passed: int, ended: float) -> float | None:
    """Return the time at which the attempt had done step `passed`, interpolated between two records."""
    if first is None or passed <= account.start_step:
        return None
    at, step = first, account.start_step + 1
    for record in account.steps:
        time, reached = float(record["time"]), int(record["step"])
        if reached >= passed:
            share = (passed - step) / (reached - step) if reached > step else 1.0
            return at + min(max(share, 0.0), 1.0) * (time - at)
        at, step = time, reached
    return ended


def _pauses(account: Account) -> list[Pause]:
    kinds = {"saved": CHECKPOINT, "saved_locally": CHECKPOINT, "evaluated": EVALUATION, "stalled": STALLED}
    pauses = [
        Pause(kinds[event["event"]], float(event["time"]), float(event.get("seconds") or 0.0))
        for event in account.events
        if event.get("event") in kinds
    ]
    step = account.start_step
    for record in account.steps:
        steps, rate = int(record["step"]) - step, float(record.get("steps_per_s") or 0.0)
        step = int(record["step"])
        if rate > 0 and steps > 0:
            # `data_wait` is a fraction of the time since the record before.
            waited = float(record.get("data_wait") or 0.0) * steps / rate
            pauses.append(Pause(DATA_WAIT, float(record["time"]), waited))
    return pauses

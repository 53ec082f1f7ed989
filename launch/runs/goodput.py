"""Goodput of a run: pure functions that divide the wall time into parts, which sum to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PRODUCTIVE, QUEUE, START, REPLAYED = "productive", "queue", "start", "replayed"
CHECKPOINT, EVALUATION, DATA_WAIT, DOWN = "checkpoint", "evaluation", "data wait", "down"
PARTS = {
    PRODUCTIVE: "steps that count",
    QUEUE: "from the submission, or the decision to start again, to the start of the job",
    START: "from there to the end of the first step",
    REPLAYED: "steps done again after a restart",
    CHECKPOINT: "training stood still for a save",
    EVALUATION: "on held-out data",
    DATA_WAIT: "the step waited for its samples",
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
class Goodput:
    """Seconds by part."""

    parts: dict[str, float] = field(default_factory=dict)
    replayed_steps: int = 0

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

    def cut(self, part: str, until: float) -> None:
        """Assign the time from the last cut up to `until` to `part`."""
        until = min(max(until, self.at), self.until)
        self.parts[part] += until - self.at
        self.at = until

    def share(self, until: float, wanted: Iterator[tuple[str, float]], rest: str) -> None:
        """Split the time up to `until`: to each part in `wanted` its seconds while any remain, then to `rest`."""
        room = min(max(until, self.at), self.until) - self.at
        self.at += room
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
    return Goodput(cuts.parts, timeline.replayed_steps)


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

"""Stragglers: ranks that are slower than the others, found where no rank waits for another.

Steps take equally long on all ranks, since the reduction of gradients waits for the slowest. So the time in which a
rank fetches its data and passes forward is compared, without the gathers of FSDP, which wait as well. A rank is named
only if it is the slowest in WINDOWS windows in a row and costs a good part of each step: noise changes its place, a
throttled device does not. Nothing is done about it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from everstep.trainer.watchdog.heartbeat import Heartbeat

WINDOW_STEPS, WINDOW_S = 50, 10.0
"""Least steps, and seconds, of a window."""
WINDOWS = 3
LEAST_RATIO = 1.3
"""Least ratio to the median of the others."""
LEAST_COST = 0.1
"""Least part of a step that the others wait for the rank."""


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    ratio: float
    """Its time over the median of the other ranks'."""
    cost: float
    """Part of a step that it makes the others wait, from 0 to 1."""
    step: int

    @property
    def line(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow: data and forward pass take {self.ratio:.1f} × the median of the "
            f"other ranks, which costs {self.cost:.0%} of each step"
        )


@dataclass(frozen=True)
class _Since:
    """Beginning of a window."""

    at: float
    beats: Mapping[int, Heartbeat]

    @property
    def step(self) -> int:
        return max(beat.step for beat in self.beats.values())


class StragglerSearch:
    """Comparison of all ranks' times, on the rank that judges."""

    def __init__(self, window_steps: int = WINDOW_STEPS, window_s: float = WINDOW_S) -> None:
        self.window_steps = window_steps
        self.window_s = window_s
        self.found: Straggler | None = None
        """Straggler of the last windows."""
        self._since: _Since | None = None
        self._last: deque[Straggler | None] = deque(maxlen=WINDOWS)
        """The slow rank of each of the last windows."""

    def see(self, beats: Mapping[int, Heartbeat], now: float) -> bool:
        """Take note of all ranks' heartbeats; True if `found` has changed."""
        if len(beats) < 2 or any(beat.passes == 0 or beat.has_left for beat in beats.values()):
            return False
        here = _Since(now, dict(beats))
        if self._since is None:
            self._since = here
            return False
        if here.step - self._since.step < self.window_steps or now - self._since.at < self.window_s:
            return False
        self._last.append(_slowest(self._since, here))
        self._since = here
        before, self.found = self.found, self._named()
        return (before and before.rank) != (self.found and self.found.rank)

    def _named(self) -> Straggler | None:
        """Return the rank that was slow in all of the last windows; the one before, until it was slow in none."""
        ranks = [each.rank if each is not None else None for each in self._last]
        newest = self._last[-1]
        if newest is not None and ranks == [newest.rank] * WINDOWS:
            return newest
        return self.found if self.found is not None and self.found.rank in ranks else None

    def restart(self) -> None:
        """Begin a new window: this process was suspended."""
        self._since = None
        self._last.clear()


def _slowest(since: _Since, until: _Since) -> Straggler | None:
    """Return the slowest rank of a window if it costs enough."""
    steps = until.step - since.step
    means: dict[int, float] = {}
    for rank, beat in until.beats.items():
        before = since.beats.get(rank)
        if before is None or beat.passes <= before.passes:
            return None
        means[rank] = (beat.own_s - before.own_s) / (beat.passes - before.passes)
    rank = max(means, key=lambda each: means[each])
    beat, before = until.beats[rank], since.beats[rank]
    median = statistics.median(seconds for other, seconds in means.items() if other != rank)
    waited = (means[rank] - median) * (beat.passes - before.passes) / steps
    ratio, cost = means[rank] / max(median, 1e-9), waited * steps / (until.at - since.at)
    if ratio < LEAST_RATIO or cost < LEAST_COST:
        return None
    return Straggler(rank, beat.process.host, ratio, cost, until.step)

"""Judge: decide from heartbeats that a run is stalled, and because of which ranks.

The lowest living rank judges. A rank reads the heartbeat of rank 0; while that one is silent, also the next rank's, and
so on. A rank below which all are silent reads all ranks and judges.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from everstep.trainer.watchdog.heartbeat import Heartbeat, Process


class Kind(enum.Enum):
    frozen = "frozen"
    """The process runs no Python: it is stopped, or a C function holds Python's lock."""
    stalled = "stalled"
    """The process lives, its main thread makes no progress, and others that are ahead wait for it."""
    waiting = "waiting"
    """All ranks have come equally far and wait."""


@dataclass(frozen=True)
class Suspect:
    """One rank of a verdict."""

    rank: int
    process: Process
    phase: int
    step: int
    turn: int
    seconds: float
    """Time without progress."""
    witness: int | None
    """Living rank beside it that dumps its stacks and ends it; None if there is none."""


@dataclass(frozen=True)
class Verdict:
    kind: Kind
    judge: int
    step: int
    """Step that the run does not get beyond."""
    suspects: tuple[Suspect, ...]
    """Ranks that are behind; all living ranks if `kind` is waiting."""

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "kind": self.kind.value})

    @staticmethod
    def from_json(text: str) -> Verdict:
        facts = json.loads(text)
        suspects = [Suspect(**{**each, "process": Process(**each["process"])}) for each in facts["suspects"]]
        return Verdict(**{**facts, "kind": Kind(facts["kind"]), "suspects": tuple(suspects)})


class Judge:
    """One rank's view of the others; all moments are by its own monotonic clock."""

    def __init__(self, rank: int, world: int, stall_s: float, silent_s: float) -> None:
        """`silent_s`: seconds without a heartbeat after which the next rank begins to look."""
        self.rank = rank
        self.world = world
        self.stall_s = stall_s
        self.silent_s = silent_s
        self._beats: dict[int, Heartbeat] = {}
        self._changed: dict[int, float] = {}
        """Rank → time at which its heartbeat last changed, or was first seen."""
        self._since: dict[int, float] = {}
        """Rank → time since which it has been read."""

    def wanted(self, now: float) -> Sequence[int]:
        """Return the ranks to read: all if this rank judges."""
        for lower in range(self.rank):
            if not self._is_out(lower, now):
                return range(lower + 1)
        return range(self.world)

    def _is_out(self, rank: int, now: float) -> bool:
        beat = self._beats.get(rank)
        return beat is not None and (beat.has_left or now - self._changed[rank] > self.silent_s)

    def resume(self, now: float) -> None:
        """Forget for how long the others have been silent: this process was itself suspended."""
        self._changed = dict.fromkeys(self._changed, now)
        self._since = dict.fromkeys(self._since, now)

    def see(self, beats: Mapping[int, Heartbeat], now: float) -> Verdict | None:
        """Take note of heartbeats; return a verdict if this rank judges and the run is stalled."""
        for rank, beat in beats.items():
            last = self._beats.get(rank) if rank in self._since else None
            if last is None or last.beat != beat.beat:
                self._changed[rank] = now
            self._since.setdefault(rank, now)
        self._since = {rank: self._since[rank] for rank in beats}
        self._beats = dict(beats)
        return self._verdict(now) if len(beats) == self.world else None

    def _verdict(self, now: float) -> Verdict | None:
        watched = {rank: beat for rank, beat in self._beats.items() if not beat.has_left}
        silence = {rank: now - self._changed[rank] for rank in watched if rank != self.rank}
        if any(seconds >= self.stall_s for seconds in silence.values()):
            # A rank that froze before this one began to judge has been seen silent for less time than it was.
            frozen = [rank for rank, s in silence.items() if s >= self.stall_s or self._always_silent(rank, s)]
            return self._of(Kind.frozen, frozen, watched, silence)
        if any(seconds > self.silent_s for seconds in silence.values()):
            return None  # it is frozen, or was only late
        if not watched or not all(beat.is_stalled for beat in watched.values()):
            return None
        least = min(beat.place for beat in watched.values())
        behind = [rank for rank, beat in watched.items() if beat.place == least]
        kind = Kind.waiting if len(behind) == len(watched) > 1 else Kind.stalled
        return self._of(kind, behind, watched, {rank: watched[rank].age_s for rank in behind})

    def _always_silent(self, rank: int, seconds: float) -> bool:
        return seconds > self.silent_s and self._changed[rank] == self._since[rank]

    def _of(
        self, kind: Kind, ranks: Sequence[int], watched: Mapping[int, Heartbeat], seconds: Mapping[int, float]
    ) -> Verdict:
        frozen = ranks if kind is Kind.frozen else ()
        # The last heartbeat of a frozen rank may be some steps old; those that wait for it are where it is.
        step = min((beat.step for rank, beat in watched.items() if rank not in frozen), default=0)
        suspects = []
        for rank in ranks:
            beat = watched[rank]
            beside = (r for r in watched if r != rank and r not in frozen)
            witness = next((r for r in beside if watched[r].process.is_beside(beat.process)), None)
            suspects.append(Suspect(rank, beat.process, beat.phase, beat.step, beat.turn, seconds[rank], witness))
        return Verdict(kind, self.rank, step, tuple(suspects))

"""Stall of a run, as it is reported: which ranks keep it from going on, since when, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from everstep.trainer.watchdog.activity import Phase
from everstep.trainer.watchdog.evidence import Evidence
from everstep.trainer.watchdog.judge import Kind, Suspect, Verdict

STATES = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waits for a disk or a device", "R": "busy"}
"""States of a process that say why it does not go on, in /proc."""
PLACES = {
    Phase.build: "while it is built",
    Phase.restore: "while it is restored",
    Phase.rehearse: "in the first pass",
    Phase.data: "waiting for data",
    Phase.forward: "in the forward pass of microbatch {turn}",
    Phase.backward: "in the backward pass of microbatch {turn}",
    Phase.update: "in the update",
    Phase.hook: "in hook {turn}",
    Phase.rollback: "while it is rolled back",
    Phase.evaluate: "in the evaluation, microbatch {turn}",
    Phase.save: "in a save",
    Phase.end: "at the end of the run",
}
MOST_NAMED = 8
"""Ranks that the line of a stall names."""


@dataclass(frozen=True)
class Culprit:
    suspect: Suspect
    evidence: Evidence

    @property
    def place(self) -> str:
        turn = self.suspect.turn
        return PLACES[Phase(self.suspect.phase)].format(turn=turn)

    @property
    def line(self) -> str:
        process, facts = self.suspect.process, self.evidence.facts or {}
        state = str(facts.get("state", "unknown"))
        state += f", {STATES[state]}" if state in STATES else ""
        where = f": {self.evidence.line}" if self.evidence.line else ""
        return (
            f"rank {self.suspect.rank} on {process.host} (pid {process.pid}, state {state}) for "
            f"{self.suspect.seconds:.1f} s in step {self.suspect.step}, {self.place}{where}"
        )

    def facts(self) -> dict[str, Any]:
        suspect = self.suspect
        return {
            "rank": suspect.rank,
            "node": suspect.process.host,
            "pid": suspect.process.pid,
            "phase": Phase(suspect.phase).name,
            "step": suspect.step,
            "turn": suspect.turn,
            "seconds": round(suspect.seconds, 2),
            "line": self.evidence.line,
            **(self.evidence.facts or {}),
        }


@dataclass(frozen=True)
class Stall:
    """A run that does not go on; without culprits, all ranks wait and none is behind."""

    kind: Kind
    step: int
    seconds: float
    ranks: int
    """Living ranks."""
    culprits: Sequence[Culprit]
    place: str = ""

    @property
    def reason(self) -> str:
        if not self.culprits:
            return (
                f"all {self.ranks} ranks have waited for {self.seconds:.1f} s in step {self.step}, {self.place}: "
                "none of them is behind, so the network or a device is suspect"
            )
        verb = "frozen" if self.kind is Kind.frozen else "stalled"
        more = f"; and {len(self.culprits) - MOST_NAMED} more" if len(self.culprits) > MOST_NAMED else ""
        return f"{verb}: {'; '.join(each.line for each in self.culprits[:MOST_NAMED])}{more}"


def stall_of(verdict: Verdict, evidence: Mapping[int, Evidence], world: int) -> Stall:
    """Return the stall that a verdict and the evidence of its suspects show."""
    suspects = verdict.suspects
    kind, named = verdict.kind, suspects
    if kind is not Kind.frozen and len(suspects) > 1:
        named = _narrowed(suspects, evidence)
        if kind is Kind.waiting and named:
            kind = Kind.stalled
        named = named or (suspects if kind is Kind.stalled else ())
    culprits = [_culprit(each, evidence.get(each.rank, Evidence())) for each in named]
    seconds = max(each.suspect.seconds for each in culprits or [Culprit(each, Evidence()) for each in suspects])
    return Stall(kind, verdict.step, seconds, world, culprits, Culprit(suspects[0], Evidence()).place)


def _culprit(suspect: Suspect, evidence: Evidence) -> Culprit:
    """Return a culprit at the place that its process has marked last, where that is known."""
    if evidence.mark is None:
        return Culprit(suspect, evidence)
    phase, step, turn, seconds = evidence.mark
    return Culprit(replace(suspect, phase=phase, step=step, turn=turn, seconds=seconds), evidence)


def _narrowed(suspects: Sequence[Suspect], evidence: Mapping[int, Evidence]) -> tuple[Suspect, ...]:
    """Return those of equally late ranks that do not wait in a collective; empty if all do."""
    known = [each for each in suspects if each.rank in evidence and evidence[each.rank].frames]
    acting = tuple(each for each in known if not evidence[each.rank].waits)
    if 0 < len(acting) < len(known):
        return acting
    entered = {each.rank: evidence[each.rank].collectives for each in known}
    odd = _odd({rank: each for rank, each in entered.items() if each is not None})
    return tuple(each for each in known if each.rank in odd)


def _odd(entered: Mapping[int, tuple[int, str]]) -> set[int]:
    """Return ranks that have not joined the collective of the others, or that are alone in another."""
    counts = {rank: count for rank, (count, _) in entered.items()}
    if len(set(counts.values())) > 1:
        return {rank for rank, count in counts.items() if count == min(counts.values())}
    common = Counter(last for _, last in entered.values()).most_common(2)
    if len(common) < 2 or common[0][1] == common[1][1]:
        return set()
    return {rank for rank, (_, last) in entered.items() if last != common[0][0]}

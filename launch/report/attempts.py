"""Attempts of a run for the time line: a row a node, a bar an attempt, cut by phase as in goodput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from everstep.launch.report.nodes import hosts_of
from everstep.launch.runs.goodput import DOWN, QUEUE, START, Goodput, Pause, Span
from everstep.launch.runs.history import READERS, Attempt, History
from everstep.launch.runs.status import last_words
from everstep.outcome import Outcome
from everstep.run_folder import RunFolder

MOST_ROWS = 64
MOST_PAUSES = 400
MOST_WORDS = 30
"""Attempts whose last lines are shown, the newest."""
WAITING = "no node"
"""Row of the time in which the run has no processes."""


@dataclass(frozen=True)
class AttemptRow:
    """One attempt and what followed it. Times are seconds since the epoch."""

    number: int
    began: float
    ended: float | None
    hosts: Sequence[str]
    world: int | None
    from_step: int
    step: int | None
    outcome: str
    reason: str
    decision: str
    words: Sequence[str]
    """Last lines of the log of the rank that ended it."""


@dataclass(frozen=True)
class Bar:
    """A phase of an attempt on one row; attempt 0 is the time between attempts."""

    row: int
    attempt: int
    part: str
    since: float
    until: float


@dataclass(frozen=True)
class AttemptsView:
    """The table and the time line of all attempts."""

    attempts: Sequence[AttemptRow] = ()
    rows: Sequence[str] = ()
    bars: Sequence[Bar] = ()
    left_out_rows: int = 0


def view(folder: RunFolder, history: History, spent: Goodput) -> AttemptsView:
    with ThreadPoolExecutor(READERS) as pool:
        attempts = list(pool.map(lambda each: _row(folder, history, each), history.attempts))
    names = list(dict.fromkeys(host for each in attempts for host in each.hosts))
    waits = any(_owner(span, attempts) == 0 for span in spent.spans)
    rows = [*names[:MOST_ROWS], *([WAITING] if waits else [])]
    bars = [bar for span in spent.spans for bar in _bars(span, attempts, rows)]
    bars += [bar for pause in _longest(spent) for bar in _bars(pause, attempts, rows)]
    return AttemptsView(attempts, rows, bars, max(0, len(names) - MOST_ROWS))


def _row(folder: RunFolder, history: History, attempt: Attempt) -> AttemptRow:
    ending = attempt.ending
    restored = folder.facts(folder.attempt(attempt.number, "restored.json")).get("step")
    failed = ending is None or ending.outcome is not Outcome.done
    recent = attempt.number > history.attempts[-1].number - MOST_WORDS
    return AttemptRow(
        attempt.number,
        attempt.began_at,
        ending.time if ending else None,
        hosts_of(folder, attempt),
        attempt.world,
        restored if type(restored) is int else 0,
        ending.step if ending else None,
        ending.outcome.value if ending else "no outcome recorded",
        ending.reason if ending else "",
        _decision(history, attempt),
        last_words(folder, attempt) if failed and recent else (),
    )


def _decision(history: History, attempt: Attempt) -> str:
    """Return the reason of the first decision between this attempt and the next."""
    later = [each.claimed_at for each in history.attempts if each.number > attempt.number]
    until = min(later, default=float("inf"))
    made: Mapping[str, Any] = next(
        (each for each in history.decisions if attempt.claimed_at < float(each.get("time") or 0.0) <= until), {}
    )
    return str(made.get("reason") or "")


def _owner(span: Span, attempts: Sequence[AttemptRow]) -> int:
    """Return the number of the attempt that a span belongs to; 0 for the time between attempts."""
    if span.part in (DOWN, QUEUE):
        return 0
    middle = (span.since + span.until) / 2
    began = [each.number for each in attempts if each.began <= middle]
    if span.part == START:  # a job start ends where its attempt begins
        began += [each.number for each in attempts if each.began == span.until]
    return max(began, default=0)


def _bars(span: Span, attempts: Sequence[AttemptRow], rows: Sequence[str]) -> list[Bar]:
    owner = _owner(span, attempts)
    hosts = next((each.hosts for each in attempts if each.number == owner), [WAITING])
    return [Bar(rows.index(host), owner, span.part, span.since, span.until) for host in hosts if host in rows]


def _longest(spent: Goodput) -> list[Span]:
    """Return the pauses of training that the time line can show, as spans."""
    seen = [pause for pause in spent.pauses if pause.part != "data wait" and pause.seconds > spent.wall_s / 2000]
    longest = sorted(seen, key=lambda pause: -pause.seconds)[:MOST_PAUSES]
    return [_span(pause) for pause in longest]


def _span(pause: Pause) -> Span:
    return Span(pause.part, pause.at - pause.seconds, pause.at)

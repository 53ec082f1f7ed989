"""Status of one run at one moment: state, attempts, goodput, energy, and the last words of a failure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everstep.launch.runs.energy import energy_kwh
from everstep.launch.runs.goodput import Goodput, goodput, timeline
from everstep.launch.runs.history import Attempt, read
from everstep.launch.runs.state import RunState
from everstep.launch.runs.summary import RunSummary, summary
from everstep.launch.schedulers.registry import Statuses, statuses
from everstep.run_folder import RunFolder

LAST_LINES = 8
LAST_BYTES = 64 << 10
"""End of a log in which they are looked for."""
FAILED = (RunState.failed, RunState.lost, RunState.restarting)


@dataclass(frozen=True)
class StatusReport:
    """Status of one run at one moment."""

    line: RunSummary
    goodput: Goodput
    checkpoint_step: int | None
    error: Sequence[str]
    """Last lines of the log of the rank that failed."""
    energy_kwh: float | None = None
    """Energy of the run's GPUs; None where it is unknown."""

    def facts(self) -> dict[str, Any]:
        history = self.line.history
        return {
            **self.line.facts(time.time()),
            "job": str(history.handle) if history.handle else None,
            "nodes": _nodes(self.line),
            "checkpoint_step": self.checkpoint_step,
            "attempts": [
                {
                    "attempt": each.number,
                    "host": each.host,
                    "world": each.world,
                    "began": each.began_at,
                    "outcome": each.ending.outcome.value if each.ending else None,
                    "step": each.ending.step if each.ending else None,
                    "reason": each.ending.reason if each.ending else None,
                }
                for each in history.attempts
            ],
            "decisions": list(history.decisions),
            "error": list(self.error),
            "energy_kwh": None if self.energy_kwh is None else round(self.energy_kwh, 6),
            "goodput": {
                "fraction": round(self.goodput.fraction, 4),
                "wall_s": round(self.goodput.wall_s, 2),
                "replayed_steps": self.goodput.replayed_steps,
                "parts_s": {part: round(seconds, 2) for part, seconds in self.goodput.parts.items()},
            },
        }


def _nodes(line: RunSummary) -> list[str]:
    """Return the nodes of the current or the last job start."""
    if line.job is not None and line.job.nodes:
        return list(line.job.nodes)
    if line.history.starts:
        return list(line.history.starts[-1].hosts)
    return [line.history.last.host] if line.history.last else []


def report(folder: RunFolder, ask: Statuses = statuses) -> StatusReport:
    history = read(folder)
    here = summary(history, ask)
    until = None if here.standing.state.is_over else time.time()
    spent = goodput(timeline(folder, history, here.job, until))
    failed = here.standing.state in FAILED
    words = last_words(folder, here.history.last) if failed and here.history.last else ()
    return StatusReport(here, spent, folder.newest_step(), words, energy_kwh(folder, history))


def last_words(folder: RunFolder, attempt: Attempt) -> list[str]:
    """Return the last lines of the log of the rank that ended an attempt; empty without a log."""
    rank = attempt.ending.rank if attempt.ending else 0
    try:
        path = folder.attempt(attempt.number, f"rank-{rank:04d}.log")
        end = folder.storage.size(path)
        log = bytes(folder.storage.read_range(path, max(0, end - LAST_BYTES), end))
    except FileNotFoundError:
        return []
    return log.decode(errors="replace").splitlines()[-LAST_LINES:]

"""Status of a run as rows of name and value, for a terminal."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence

from everstep.launch import console as text_tables
from everstep.launch.runs.goodput import PARTS, Goodput
from everstep.launch.runs.state import RunState
from everstep.launch.runs.status import StatusReport
from everstep.launch.runs.summary import RunSummary

SHORTEST_S = 300.0
"""Seconds of a run from which on its goodput says something; before, the start is most of it."""
VALUE_COLUMNS = 67
"""Columns left beside the names on a terminal of 80."""
NO_BREAK = "\N{NO-BREAK SPACE}"


def rows(report: StatusReport) -> list[tuple[str, str]]:
    """Return name and value of all known facts."""
    facts, history = report.facts(), report.line.history
    why, going = report.line.standing.why, report.line.standing.state is RunState.training
    total = f" of {facts['steps']}" if facts["steps"] else ""
    steps = f"{facts['step']}{total}" if facts["step"] is not None else ""
    if going and facts["steps_per_s"]:
        steps += f", {text_tables.rate(facts['steps_per_s'])}, {text_tables.duration(facts['eta_s'])} left"
    shown = [
        ("run", f"{history.name} in {history.url}"),
        ("state", facts["state"] + (f": {why}" if why else "")),
        ("job", facts["job"] or ""),
        ("attempt", _attempt(report.line)),
        ("nodes", " ".join(facts["nodes"])),
        ("step", steps),
        ("straggler", str(history.progress.get("straggler") or "") if going else ""),
        ("metric", f"{facts['metric']} {text_tables.number(facts['value'])}" if facts["value"] is not None else ""),
        ("checkpoint", f"step {report.checkpoint_step}" if report.checkpoint_step is not None else ""),
        ("energy", f"{report.energy_kwh:.3g} kWh of GPUs" if report.energy_kwh is not None else ""),
    ]
    shown = [(name, value) for name, value in shown if value]
    return shown + _restarts(report) + _goodput(report.goodput) + [("", row) for row in _indented(report.error)]


def _attempt(line: RunSummary) -> str:
    last = line.history.last
    if last is None:
        return ""
    world = f", {last.world} {'process' if last.world == 1 else 'processes'}" if last.world else ""
    return f"{last.number}{world}, began {text_tables.duration(time.time() - last.began_at)} ago"


def _restarts(report: StatusReport) -> list[tuple[str, str]]:
    """Return rows for the last few decisions to restart, with their reasons."""
    decisions = [each for each in report.line.history.decisions if each.get("go_on")]
    ago = (text_tables.duration(time.time() - float(each.get("time") or 0.0)) for each in decisions[-3:])
    told = [f"{when} ago: {each.get('reason', '')}" for when, each in zip(ago, decisions[-3:], strict=True)]
    more = f" (the last 3 of {len(decisions)})" if len(decisions) > 3 else ""
    return [(f"restarts{more}" if not n else "", each if not n else f"{'':<12} {each}") for n, each in enumerate(told)]


def _goodput(spent: Goodput) -> list[tuple[str, str]]:
    if spent.wall_s < SHORTEST_S:
        return []
    replayed = f" ({spent.replayed_steps} steps)" if spent.replayed_steps else ""
    lost = [
        f"{part}{replayed if part == 'replayed' else ''} {text_tables.duration(seconds)} ({seconds / spent.wall_s:.1%})"
        for part, seconds in sorted(spent.parts.items(), key=lambda item: -item[1])
        if part != next(iter(PARTS)) and seconds >= 0.0005 * spent.wall_s
    ]
    whole = f"{spent.fraction:.1%} of {text_tables.duration(spent.wall_s)}"
    told = whole + (f"; the rest: {', '.join(part.replace(' ', NO_BREAK) for part in lost)}" if lost else "")
    first, *more = (row.replace(NO_BREAK, " ") for row in textwrap.wrap(told, VALUE_COLUMNS))
    return [("goodput", first), *(("", f"{'':<12} {row}") for row in more)]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]

"""`everstep status RUN`: print the state of a run, the reason, and its goodput."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Sequence

from everstep.errors import printable
from everstep.launch import console as text_tables
from everstep.launch.parser import Arguments
from everstep.launch.runs.goodput import PARTS, Goodput
from everstep.launch.runs.lookup import add_run, find
from everstep.launch.runs.state import RunState
from everstep.launch.runs.status import StatusReport, report
from everstep.launch.runs.summary import RunSummary
from everstep.launch.schedulers.registry import Statuses, following
from everstep.launch.sweep.sweep_folder import sweep_at
from everstep.run_folder import RunFolder

REFRESH_S = 2.0
SHORTEST_S = 300.0
"""Seconds of a run from which on its goodput says something; before, the start is most of it."""
VALUE_COLUMNS = 67
"""Columns left beside the names on a terminal of 80."""
NO_BREAK = "\N{NO-BREAK SPACE}"


def status(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is 0 for any state of the run."""
    options = _parser().parse_args(arguments)
    if (sweep := sweep_at(options.run, options.root)) is not None:
        from everstep.launch.sweep import status as looks  # imported for a sweep only, to keep start-up fast

        return looks.status(sweep, options.json)
    folder = find(options.run, options.root)
    if options.follow:
        with following() as ask:
            return _follow(folder, ask, options.json)
    _print(report(folder), options.json)
    return 0


def _print(report: StatusReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.facts(), indent=1), flush=True)
        return
    for name, value in rows(report):
        print(printable(f"{name:<12} {value}" if name else value), flush=True)


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


def _follow(folder: RunFolder, ask: Statuses, as_json: bool) -> int:
    """Print the status until the run is over: in place on a terminal, else a line for each change."""
    if sys.stdout.isatty() and not as_json:
        return _live(folder, ask)
    shown: tuple[object, ...] = ()
    while True:
        found = report(folder, ask)
        facts = found.facts()
        key = (facts["state"], facts["why"], facts["step"], facts["attempt"], facts["checkpoint_step"])
        if key != shown:
            shown = key
            print(json.dumps(facts) if as_json else _one_line(found), flush=True)
        if found.line.standing.state.is_over:
            return 0
        time.sleep(REFRESH_S)


def _one_line(report: StatusReport) -> str:
    kept = {name: value for name, value in rows(report) if name in ("state", "attempt", "step", "checkpoint")}
    return "  ".join(value if name == "state" else f"{name} {value}" for name, value in kept.items())


def _live(folder: RunFolder, ask: Statuses) -> int:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            found = report(folder, ask)
            live.update(
                Text(printable("\n".join(f"{name:<12} {value}" if name else value for name, value in rows(found))))
            )
            live.refresh()
            if found.line.standing.state.is_over:
                return 0
            time.sleep(REFRESH_S)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="everstep status", description="Where a run stands, why, and its goodput.")
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="an object, for scripts; with -f one a line")
    parser.add_argument("-f", "--follow", action="store_true", help="again and again until the run is over")
    return parser

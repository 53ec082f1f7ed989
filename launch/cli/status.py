"""`everstep status RUN`: print the state of a run, the reason, and its goodput."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from everstep.errors import printable
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import add_run, find
from everstep.launch.runs.status import StatusReport, report
from everstep.launch.runs.status_text import rows
from everstep.launch.schedulers.registry import Statuses, following
from everstep.launch.sweep.sweep_folder import sweep_at
from everstep.run_folder import RunFolder

REFRESH_S = 2.0


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

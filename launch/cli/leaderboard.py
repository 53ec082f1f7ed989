"""`everstep leaderboard SWEEP`: list the trials, best first."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from everstep.config import Goal
from everstep.errors import EverstepError
from everstep.launch.parser import Arguments
from everstep.launch.runs.goodput import goodput, timeline
from everstep.launch.runs.history import READERS, read
from everstep.launch.runs.lookup import add_root
from everstep.launch.sweep.leaderboard import Row, by_metric, facts, named_values, print_rows, ranked, write_csv
from everstep.launch.sweep.plan import Plan, load
from everstep.launch.sweep.sweep_folder import find_sweep


def leaderboard(arguments: Sequence[str]) -> int:
    """Run the verb."""
    options = _parser().parse_args(arguments)
    plan = load(find_sweep(options.sweep, options.root))
    story = plan.folder.story()
    rows = ranked(plan, story)
    if options.metric is not None:
        rows = by_metric(plan, rows, options.metric, Goal(options.goal) if options.goal else plan.goals[0])
    with ThreadPoolExecutor(READERS) as pool:
        rows = list(pool.map(lambda row: _with_goodput(plan, row), rows))
    names = plan.metrics if options.metric is None else [options.metric]
    if options.csv is not None:
        write_csv(plan, rows, names, Path(options.csv))
    if options.json:
        print(json.dumps([facts(plan, row) | named_values(names, row) for row in rows], indent=1))
    elif options.csv is None:
        print_rows(plan, rows, names)
    return 0


def _with_goodput(plan: Plan, row: Row) -> Row:
    folder = plan.folder.run(row.trial.name)
    try:
        until = time.time() if row.trial.is_open else None
        spent = goodput(timeline(folder, read(folder), None, until)).fraction
    except EverstepError:
        return row
    return Row(row.trial, row.state, row.values, row.step, row.is_best, spent)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="everstep leaderboard", description="The trials of a sweep, the best first.")
    parser.add_argument("sweep", metavar="SWEEP", help="a name, a path or a URL")
    parser.add_argument("--metric", metavar="NAME", help="rank by another metric of the evaluation")
    parser.add_argument("--goal", choices=[goal.value for goal in Goal], help="of that metric (the sweep's own)")
    parser.add_argument("--csv", metavar="FILE", help="write a table for other programs")
    parser.add_argument("--json", action="store_true", help="a list of objects, for scripts")
    add_root(parser)
    return parser

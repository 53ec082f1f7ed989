"""`everstep ls`: list all runs in a folder of runs, one line each."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from everstep.errors import ConfigError
from everstep.launch import console as text_tables
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import ROOT
from everstep.launch.runs.state import RunState
from everstep.launch.runs.summary import lines

COLUMNS = ("run", "state", "step", "rate", "left", "last metric", "attempt", "where", "age")
SPARE = ("attempt", "age", "rate", "last metric", "left")
"""Columns to drop on a narrow terminal, in this order; status and --json still show them."""


def ls(arguments: Sequence[str]) -> int:
    """Run the verb."""
    options = _parser().parse_args(arguments)
    found, unreadable = lines(options.root)
    facts = [each.facts(time.time()) for each in found]
    if options.json:
        print(json.dumps(facts, indent=1))
    elif not facts and not unreadable:
        raise ConfigError(f"{options.root} holds no run; 'everstep ls ROOT' looks elsewhere")
    elif facts:
        text_tables.print_table(COLUMNS, [_row(each) for each in facts], SPARE)
    return 0


def _row(facts: dict[str, Any]) -> list[str]:
    step = "" if facts["step"] is None else f"{facts['step']}" + (f"/{facts['steps']}" if facts["steps"] else "")
    shown = "" if facts["value"] is None else f"{facts['metric']} {text_tables.number(facts['value'])}"
    going = facts["state"] == RunState.training.value
    return [
        facts["run"],
        facts["state"],
        step,
        text_tables.rate(facts["steps_per_s"]) if going else "",
        text_tables.duration(facts["eta_s"]) if going else "",
        shown,
        str(facts["attempt"] or ""),
        facts["where"],
        text_tables.duration(facts["age_s"]),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="everstep ls", description="All runs of a folder of runs.")
    parser.add_argument("root", nargs="?", default=ROOT, metavar="ROOT", help=f"a path or any URL ({ROOT})")
    parser.add_argument("--json", action="store_true", help="a list of objects, for scripts")
    return parser

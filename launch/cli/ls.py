"""`everstep ls`: all runs of a folder of runs, each in one line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everstep.launch import text_tables
from everstep.launch.runs.liveness import alive
from everstep.launch.cli.parser import Arguments
from everstep.launch.schedulers.registry import statuses
from everstep.launch.runs.history import History, NotARun, read_all
from everstep.launch.schedulers.job import JobStatus
from everstep.launch.runs.lookup import ROOT, names
from everstep.launch.messages import say
from everstep.launch.runs.state import RunState, Standing, standing
from everstep.errors import ConfigError
from everstep.run_folder import RunFolder
from everstep.storage import join_url, open_storage

COLUMNS = ("run", "state", "step", "rate", "left", "last metric", "attempt", "where", "age")
SPARE = ("attempt", "age", "rate", "last metric", "left")
"""What a narrow terminal does without, the first first: a status or --json still tells it."""


@dataclass(frozen=True)
class Line:
    """One run, as far as one look into its folder tells."""

    history: History
    job: JobStatus | None
    standing: Standing

    def facts(self, now: float) -> dict[str, Any]:
        history, progress = self.history, self.history.progress
        last, over = history.last, self.standing.state.is_over
        name, value = metric(progress)
        return {
            "run": history.name,
            "url": history.url,
            "state": self.standing.state.value,
            "why": self.standing.why,
            "step": _step(history),
            "steps": progress.get("steps"),
            "steps_per_s": progress.get("steps_per_s"),
            "eta_s": None if over else progress.get("eta_s"),
            "metric": name,
            "value": value,
            "attempt": last.number if last else None,
            "where": where(history, self.job),
            "age_s": now - history.started_at if history.started_at else None,
        }


def ls(arguments: Sequence[str]) -> int:
    """The verb."""
    options = _parser().parse_args(arguments)
    facts = [each.facts(time.time()) for each in lines(options.root)]
    if options.json:
        print(json.dumps(facts, indent=1))
    elif not facts:
        raise ConfigError(f"{options.root} holds no run; 'everstep ls ROOT' looks elsewhere")
    else:
        text_tables.print_table(COLUMNS, [_row(each) for each in facts], SPARE)
    return 0


def lines(root: str) -> list[Line]:
    """Every run below `root`, the one that was asked for last at the end: one query for all jobs."""
    store = open_storage(root)
    folders = [RunFolder(join_url(store.url, name)) for name in names(root)]
    histories: list[History] = []
    for found in read_all(folders):
        if isinstance(found, History):
            histories.append(found)
        elif not isinstance(found, NotARun):
            say(f"left out: {found}")
    jobs = statuses(each.handle for each in histories if each.handle is not None)
    ordered = sorted(histories, key=lambda each: each.started_at or 0.0)
    return [line(each, jobs.get(each.handle) if each.handle is not None else None) for each in ordered]


def line(history: History, job: JobStatus | None) -> Line:
    now = time.time()
    return Line(history, job, standing(history, job, alive(history, now), now))


def metric(progress: dict[str, Any]) -> tuple[str | None, float | None]:
    """The last evaluation's `evaluate.metric`, or the training loss."""
    evaluated = progress.get("metrics") or {}
    name = progress.get("metric")
    return (name, evaluated[name]) if name in evaluated else ("loss", progress.get("loss"))


def where(history: History, job: JobStatus | None) -> str:
    """Nodes and job, or the host of the last attempt."""
    if history.handle is not None:
        nodes = "" if job is None or not job.nodes else f" on {job.nodes[0]}"
        more = "" if job is None or len(job.nodes) < 2 else f" +{len(job.nodes) - 1}"
        return f"{history.handle.scheduler} {history.handle.id}{nodes}{more}"
    return history.last.host if history.last else ""


def _step(history: History) -> int | None:
    last = history.last
    if last is not None and last.ending is not None:
        return max(last.ending.step, int(history.progress.get("step") or 0))
    return history.progress.get("step")


def _row(facts: dict[str, Any]) -> list[str]:
    step = "" if facts["step"] is None else f"{facts['step']}/{facts['steps'] or '?'}"
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

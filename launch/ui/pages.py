"""Contents of the served pages: a list of runs, the report of one, figures for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from everstep.errors import ConfigError, printable
from everstep.launch.report.facts import collect
from everstep.launch.report.page import page
from everstep.launch.report.text import clean
from everstep.launch.runs.lookup import names
from everstep.launch.top.table import COLUMNS, GOING, RunTable
from everstep.run_folder import RunFolder
from everstep.storage import join_url

GAUGES = {
    "step": ("everstep_step", "Steps done."),
    "steps": ("everstep_steps", "Steps asked for."),
    "steps_per_s": ("everstep_steps_per_second", "Rate of the newest window."),
    "eta_s": ("everstep_left_seconds", "Seconds left at this rate."),
    "value": ("everstep_metric", "Last evaluation's metric, or the loss."),
    "attempt": ("everstep_attempts", "Attempts so far."),
}
"""Fact of a run → name and help of a gauge."""


REFRESH_S = 10


@dataclass(frozen=True)
class Page:
    """One answer."""

    text: str
    kind: str = "text/html; charset=utf-8"
    refresh_s: int | None = None
    """Seconds after which a browser asks again; None for what does not change."""


def runs_page(table: RunTable) -> Page:
    """Return the list of runs."""
    found = table.refresh()
    rows = [{"link": f"/run/{quote(each['run'], safe='')}", "cells": table.cells(each)} for each in found]
    facts = {"root": table.root, "columns": COLUMNS, "rows": rows, "left_out": table.left_out}
    return Page(page(clean(facts), "runs.html.j2"), refresh_s=REFRESH_S)


def run_page(root: str, name: str) -> Page:
    """Return the report of one run below `root`; ConfigError if there is none of that name."""
    if name not in names(root):
        raise ConfigError(f"{printable(name)}: there is no such run")
    facts = clean(collect(RunFolder(join_url(root, name))))
    return Page(page(facts, "run.html.j2"), refresh_s=REFRESH_S if facts["status"]["state"] in GOING else None)


def metrics_page(table: RunTable) -> Page:
    """Return the figures of all runs in the text format of Prometheus."""
    found = table.refresh()
    lines = ["# HELP everstep_state State of a run: 1 for the one that it is in.", "# TYPE everstep_state gauge"]
    lines += [f"everstep_state{_labels(run=each['run'], state=each['state'])} 1" for each in found]
    for fact, (gauge, meaning) in GAUGES.items():
        lines += [f"# HELP {gauge} {meaning}", f"# TYPE {gauge} gauge", *_samples(found, fact, gauge)]
    return Page("\n".join(lines) + "\n", "text/plain; version=0.0.4; charset=utf-8")


def _samples(found: Iterable[Mapping[str, Any]], fact: str, gauge: str) -> Iterable[str]:
    for each in found:
        if isinstance(value := each[fact], int | float) and math.isfinite(value):
            labels = {"run": each["run"], **({"metric": each["metric"]} if fact == "value" else {})}
            yield f"{gauge}{_labels(**labels)} {value}"


def _labels(**labels: str) -> str:
    """Return labels as Prometheus reads them: backslash, quote and line feed are escaped."""
    escaped = {
        name: printable(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"

"""Facts of one run for its page: status, curve of the loss, end of the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everstep.launch.report.curves import Point, read_curves
from everstep.launch.runs.status import StatusReport, last_words, report
from everstep.run_folder import RunFolder

METRIC = "loss"


@dataclass(frozen=True)
class RunPage:
    """One look at a run."""

    report: StatusReport
    metric: str
    points: Sequence[Point]
    log: Sequence[str]


def read_page(folder: RunFolder) -> RunPage:
    """Read a run's folder; EverstepError if it is not one."""
    status = report(folder)
    history = status.line.history
    charts = read_curves(folder, [each.number for each in history.attempts]).charts
    curves = [curve for chart in charts if chart.name == METRIC for curve in chart.curves if curve.source == "train"]
    log = [] if status.error or history.last is None else last_words(folder, history.last)
    return RunPage(status, METRIC, curves[0].points if curves else (), log)

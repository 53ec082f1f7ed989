"""Advice: at most three lines on what to do next, each with the measurement behind it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.config import RunConfig
from everstep.launch.console import duration
from everstep.launch.report.curves import Curves
from everstep.launch.report.headline import Best
from everstep.launch.report.nodes import NodeFigures

MOST = 3
DATA_WAIT, SAVES, EVALUATIONS, STARTS, REPLAYED, DOWN = 0.10, 0.05, 0.15, 0.20, 0.05, 0.10
"""Shares of the wall time from which on a line of advice pays."""
LONG_S = 300.0
"""Seconds of a run from which on its shares say something."""
ROOMY_PERCENT = 50.0
PAST_BEST = 0.5
"""Share of the run since its best evaluation, from which on a line of advice says so."""


@dataclass(frozen=True)
class Advice:
    """One line, and the measurement behind it."""

    do: str
    because: str


def advice(
    status: Mapping[str, Any], config: RunConfig, best: Best | None, curves: Curves, nodes: NodeFigures, straggler: str
) -> list[Advice]:
    found = [*_of_state(status), *_of_numbers(curves, config), *_of_straggler(straggler), *_of_time(status, config)]
    return [*found, *_of_memory(nodes, config), *_of_metric(status, best, config)][:MOST]


def _of_state(status: Mapping[str, Any]) -> Iterator[Advice]:
    run, state, why = _where(status), status["state"], str(status["why"] or "no reason is recorded")
    if state == "failed":
        yield Advice(f"Read the failure: everstep logs {run} --tail 40. Mend it, then: everstep resume {run}", why)
    elif state in ("lost", "stopped", "cancelled"):
        saved = status["checkpoint_step"]
        begins = "no checkpoint, so it begins again" if saved is None else f"the newest checkpoint is of step {saved:,}"
        yield Advice(f"Go on: everstep resume {run}", f"{state}: {why}; {begins}")
    elif state == "silent":
        yield Advice(f"Look whether it lives: everstep logs {run} -f", why)


def _where(status: Mapping[str, Any]) -> str:
    return shlex.quote(str(status["url"]))


def _of_numbers(curves: Curves, config: RunConfig) -> Iterator[Advice]:
    for chart in curves.charts:
        for curve in chart.curves:
            if chart.name == "loss" and curve.nonfinite:
                first = f"{curve.source} loss was NaN or Inf in {curve.nonfinite} of {curve.count} records"
                at = f", first at step {curve.nonfinite_steps[0]:,}"
                yield Advice(
                    "Lower optimizer.lr or optimizer's clipping of gradients, or try debug=anomaly", first + at
                )


def _of_straggler(line: str) -> Iterator[Advice]:
    if line:
        yield Advice("Look at the slow rank's node, or leave it out with job.exclude", line)


def _of_time(status: Mapping[str, Any], config: RunConfig) -> Iterator[Advice]:
    wall_s, parts = status["goodput"]["wall_s"], status["goodput"]["parts_s"]
    if wall_s < LONG_S:
        return
    workers, saves, evaluations = config.loader.workers, config.checkpoint.every, config.evaluate.every
    lines = (
        ("data wait", DATA_WAIT, f"Raise loader.workers (now {workers})"),
        ("checkpoint", SAVES, f"Save less often: checkpoint.every={2 * saves} (now {saves})"),
        ("evaluation", EVALUATIONS, f"Evaluate less often: raise evaluate.every (now {evaluations})"),
        ("replayed", REPLAYED, f"Save more often: checkpoint.every={max(1, saves // 2)} (now {saves})"),
        ("down", DOWN, "Raise job.max_restarts, or have a failure told: job.notify.on=[failure,stall]"),
        ("start", STARTS, "See laps_s of first_step in events.jsonl for what the starts do"),
    )
    told = [(parts.get(part, 0.0), part, least, do) for part, least, do in lines]
    for seconds, part, least, do in sorted(told, key=lambda each: -each[0]):
        if seconds >= least * wall_s:
            yield Advice(do, f"{part}: {duration(seconds)}, {seconds / wall_s:.1%} of the wall time")


def _of_memory(nodes: NodeFigures, config: RunConfig) -> Iterator[Advice]:
    used = [max(value for _, value in each.points) for each in nodes.series if each.figure == "gpu_memory_percent"]
    if used and max(used) < ROOMY_PERCENT:
        yield Advice(
            f"A larger micro_batch may fit (now {config.micro_batch})",
            f"GPU memory: at most {max(used):.0f} % of it was in use",
        )


def _of_metric(status: Mapping[str, Any], best: Best | None, config: RunConfig) -> Iterator[Advice]:
    if best is None or status["state"] != "done" or not status["step"]:
        return
    last, since = int(status["step"]), int(status["step"]) - best.step
    if since == 0:
        yield Advice(
            f"Train longer: everstep resume {_where(status)} steps={2 * last}",
            f"{best.metric} was best at the last step",
        )
    elif since >= PAST_BEST * last:
        yield Advice(
            f"Use the checkpoint of the best step, or end earlier: evaluate.patience (now {config.evaluate.patience})",
            f"{best.metric} was best at step {best.step:,}, and did not get better in the {since:,} steps since",
        )


def last_straggler(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the line of the last slow rank that was found; empty if there was none."""
    found = [event for event in events if event.get("event") == "straggler"]
    return str(found[-1].get("line") or "") if found else ""

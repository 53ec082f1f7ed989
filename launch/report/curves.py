"""Curves of a run: each metric by step, replayed steps apart, reduced to a bounded number of points."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.launch.runs.record_types import one_line
from everstep.run_folder import EVENTS, METRICS, RunFolder

BUCKETS = 600
"""Buckets of a curve; each keeps its smallest and its largest value, so that no peak is lost."""
REPLAYED_BUCKETS = 150
MOST_CHARTS = 40
MOST_MARKS = 300
"""Marks of a kind; of more, evenly spaced ones are shown."""
MOST_CELLS = 10
"""Cells NAME/ROW/COLUMN of a metric that are curves; more are a table."""
NO_CURVE = ("kind", "step", "time", "unit", "items", "samples")
FIRST = ("loss", "lr", "norm", "items_per_s", "steps_per_s", "data_wait", "mfu", "memory_mb")
Point = tuple[int, float]


@dataclass(frozen=True)
class Curve:
    """One metric, of training records or of evaluations."""

    source: str
    """train or evaluate."""
    points: Sequence[Point]
    replayed: Sequence[Point] = ()
    """Points of records that a later attempt has superseded."""
    count: int = 0
    """Records before the reduction."""
    nonfinite: int = 0
    """Records with NaN or Inf, which are gaps."""
    nonfinite_steps: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """One metric, with a curve for each of its sources."""

    name: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Matrix:
    """Metric with many cells NAME/ROW/COLUMN, at the last evaluation."""

    name: str
    step: int
    rows: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Curves:
    """All charts of a run, with the steps of its events."""

    charts: Sequence[Chart] = ()
    left_out: int = 0
    """Metrics beyond the number of charts of a page."""
    marks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """saved, restarted, evaluated → steps."""
    matrices: Sequence[Matrix] = ()


class _Records:
    """Records of one kind by step; a later record supersedes that of the same step."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, Any]] = {}
        self.superseded: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if step in self.kept:
            self.superseded.append(self.kept[step])
        self.kept[step] = record


def read_curves(folder: RunFolder, attempts: Sequence[int]) -> Curves:
    """Read the metrics and events of all attempts."""
    with one_line(folder):
        found = {"train": _Records(), "evaluate": _Records()}
        for attempt in attempts:
            for record in folder.lines(attempt, METRICS):
                if record.get("kind") in found and type(record.get("step")) is int:
                    found[str(record["kind"])].add(record)
        for records in found.values():
            records.kept = dict(sorted(records.kept.items()))
        names, tables = _names(found.values())
        shown = names[:MOST_CHARTS]
        charts = [Chart(name, [*_curves(found, name)]) for name in shown]
        matrices = [matrix for name in tables if (matrix := _matrix(found["evaluate"], name)) is not None]
        return Curves(charts, len(names) - len(shown), _marks(folder, attempts), matrices)


def _names(found: Iterable[_Records]) -> tuple[list[str], list[str]]:
    """Return the metrics that are curves, those that everybody has first, and those that are tables."""
    seen: dict[str, None] = {}
    for records in found:
        for record in records.kept.values():
            for key, value in record.items():
                if key not in seen and key not in NO_CURVE and _is_number(value):
                    seen[key] = None
    cells = Counter(_whole(name) for name in seen)
    curves = [name for name in seen if cells[_whole(name)] <= MOST_CELLS]
    order = {name: place for place, name in enumerate(FIRST)}
    tables = [name for name, count in cells.items() if count > MOST_CELLS]
    return sorted(curves, key=lambda name: (order.get(name, 1 if "loss" in name else 2), name)), tables


def _whole(name: str) -> str:
    return re.sub(r"(/\d+)+$", "", name)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _curves(found: Mapping[str, _Records], name: str) -> Iterable[Curve]:
    for source, records in found.items():
        values = [(step, float(record[name])) for step, record in records.kept.items() if _has(record, name)]
        if not values:
            continue
        finite = [point for point in values if math.isfinite(point[1])]
        wrong = [step for step, value in values if not math.isfinite(value)]
        before = [(record["step"], float(record[name])) for record in records.superseded if _has(record, name)]
        replayed = sorted(point for point in before if math.isfinite(point[1]))
        yield Curve(
            source,
            reduced(finite, BUCKETS),
            reduced(replayed, REPLAYED_BUCKETS),
            len(values),
            len(wrong),
            spaced(wrong),
        )


def _has(record: Mapping[str, Any], name: str) -> bool:
    return _is_number(record.get(name))


def reduced(points: Sequence[Point], buckets: int) -> list[Point]:
    """Return at most `2 * buckets + 2` points: the first, the last, and the extremes of each bucket."""
    if len(points) <= 2 * buckets:
        return [(step, _rounded(value)) for step, value in points]
    size = len(points) / buckets
    kept = {0, len(points) - 1}
    for number in range(buckets):
        within = range(int(number * size), int((number + 1) * size))
        kept |= {min(within, key=lambda at: points[at][1]), max(within, key=lambda at: points[at][1])}
    return [(points[at][0], _rounded(points[at][1])) for at in sorted(kept)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def spaced(steps: Sequence[int], most: int = MOST_MARKS) -> list[int]:
    """Return all, or `most` evenly spaced ones."""
    return list(steps) if len(steps) <= most else [steps[number * len(steps) // most] for number in range(most)]


def _marks(folder: RunFolder, attempts: Sequence[int]) -> dict[str, list[int]]:
    marks: dict[str, list[int]] = {"saved": [], "evaluated": [], "restarted": []}
    for attempt in attempts:
        for event in folder.lines(attempt, EVENTS):
            if event.get("event") in ("saved", "evaluated") and type(event.get("step")) is int:
                marks[event["event"]].append(event["step"])
        restored = folder.facts(folder.attempt(attempt, "restored.json")).get("step")
        if attempt != attempts[0] and type(restored) is int:
            marks["restarted"].append(restored)
    return {kind: spaced(sorted(set(steps))) for kind, steps in marks.items()}


LARGEST_MATRIX = 64


def _matrix(records: _Records, name: str) -> Matrix | None:
    """Return the cells NAME/ROW/COLUMN of the last evaluation; None if the metric is no matrix."""
    if not records.kept:
        return None
    step = max(records.kept)
    form = re.compile(re.escape(name) + r"/(\d{1,3})/(\d{1,3})")
    cells = {
        (int(at[1]), int(at[2])): float(value)
        for key, value in records.kept[step].items()
        if _is_number(value) and (at := form.fullmatch(key))
    }
    if not cells or max(max(at) for at in cells) >= LARGEST_MATRIX:
        return None
    rows, columns = (range(max(at[axis] for at in cells) + 1) for axis in (0, 1))
    return Matrix(name, step, [[cells.get((row, column)) for column in columns] for row in rows])

"""Figures of the nodes of a run, from the records of all attempts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.checked_json import mapping, parse
from everstep.launch.runs.history import Attempt
from everstep.run_folder import NODES, RunFolder
from everstep.storage import lines

MOST_NODES = 16
POINTS = 240
"""Points of a figure of a node; of more records, means of consecutive ones."""
FIGURES = {
    "cpu_percent": "CPU (%)",
    "gpu_percent": "GPUs (%)",
    "gpu_memory_percent": "GPU memory (%)",
    "gpu_power_w": "GPU power (W)",
    "memory_mb": "memory (MiB)",
    "net_in_mb_s": "network in (MB/s)",
    "net_out_mb_s": "network out (MB/s)",
    "disk_read_mb_s": "disk read (MB/s)",
    "disk_write_mb_s": "disk write (MB/s)",
}


@dataclass(frozen=True)
class NodeSeries:
    """One figure of one node: (seconds since the epoch, value); the mean over all of its records."""

    figure: str
    label: str
    host: str
    points: Sequence[tuple[float, float]]
    mean: float


@dataclass(frozen=True)
class NodeFigures:
    """Figures of the nodes, with the number of nodes beyond the limit of a page."""

    series: Sequence[NodeSeries] = ()
    left_out: int = 0


def hosts_of(folder: RunFolder, attempt: Attempt) -> list[str]:
    """Return the nodes of an attempt: those that have recorded figures, else the node of rank 0."""
    found = [attempt.host] if attempt.host else []
    for path in _files(folder, attempt.number):
        host = next((record.get("host") for record in _records(folder, path)), None)
        if type(host) is str and host not in found:
            found.append(host[:255])
    return found or ["unknown node"]


def node_figures(folder: RunFolder, attempts: Sequence[int]) -> NodeFigures:
    """Read the records of all nodes and attempts."""
    values: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for attempt in attempts:
        for path in _files(folder, attempt):
            for record in _records(folder, path):
                host, at = record.get("host"), record.get("time")
                if type(host) is str and type(at) is float:
                    for figure, value in _values(record):
                        values[host[:255], figure].append((at, value))
    hosts = sorted({host for host, _ in values})
    shown = hosts[:MOST_NODES]
    series = [
        NodeSeries(figure, label, host, _means(values[host, figure]), _mean([v for _, v in values[host, figure]]))
        for figure, label in FIGURES.items()
        for host in shown
        if (host, figure) in values
    ]
    return NodeFigures(series, len(hosts) - len(shown))


def _values(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the figures of a record, those of its GPUs as their mean."""
    yield from ((figure, float(record[figure])) for figure in FIGURES if type(record.get(figure)) in (int, float))
    for figure, form in (("gpu_percent", r"gpu\d+_percent"), ("gpu_power_w", r"gpu\d+_power_w")):
        found = [float(v) for key, v in record.items() if re.fullmatch(form, key) and type(v) in (int, float)]
        if found:
            yield figure, _mean(found)
    used, limit = (
        sum(float(v) for key, v in record.items() if re.fullmatch(form, key) and type(v) in (int, float))
        for form in (r"gpu\d+_memory_mb", r"gpu\d+_memory_limit_mb")
    )
    if limit > 0:
        yield "gpu_memory_percent", 100 * used / limit


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    ordered = sorted(points)
    size = -(-len(ordered) // POINTS)
    groups = (ordered[at : at + size] for at in range(0, len(ordered), size))
    return [(round(group[-1][0], 1), round(_mean([value for _, value in group]), 3)) for group in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _files(folder: RunFolder, attempt: int) -> list[str]:
    where = folder.attempt(attempt, NODES)
    return [f"{where}/{name}" for name in folder.storage.names(where) if name.endswith(".jsonl")]


def _records(folder: RunFolder, path: str) -> Iterator[dict[str, Any]]:
    for line in lines(folder.storage, path):
        try:
            yield mapping(parse(line), path)
        except ValueError:  # a kill may have cut the last line
            continue

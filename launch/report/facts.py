"""Facts of a run for its report, collected from its folder alone."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep import __version__
from everstep.config import RunConfig
from everstep.config.dotted import leaves
from everstep.errors import EverstepError
from everstep.frozen_config import plain, thaw
from everstep.launch.report.advice import Advice, advice, last_straggler
from everstep.launch.report.attempts import AttemptsView, view
from everstep.launch.report.checkpoints import CheckpointRow, checkpoints
from everstep.launch.report.curves import Curves, read_curves
from everstep.launch.report.headline import Figure, best_of, figures, sentence
from everstep.launch.report.media import LoggedMedia, logged
from everstep.launch.report.nodes import NodeFigures, node_figures
from everstep.launch.runs.goodput import PARTS
from everstep.launch.runs.record_types import one_line
from everstep.launch.runs.status import StatusReport
from everstep.launch.runs.status import report as status_of
from everstep.launch.schedulers.registry import Statuses, statuses
from everstep.launch.submit import comparison
from everstep.run_folder import CONFIG, DATA, EVENTS, PROVENANCE, RunFolder

FORMAT = 1
"""Version of the JSON object."""


@dataclass(frozen=True)
class ConfigKey:
    """One key of the config, with its default where it differs."""

    key: str
    value: Any
    usual: Any = None


@dataclass(frozen=True)
class RunReport:
    """Facts that the page of a run shows."""

    format: int
    everstep: str
    made_at: float
    run: str
    sentence: str
    figures: Sequence[Figure]
    advice: Sequence[Advice]
    status: Mapping[str, Any]
    """The object of `everstep status --json`."""
    phases: Mapping[str, str]
    """Part of the wall time → its meaning."""
    timeline: AttemptsView
    curves: Curves
    media: LoggedMedia
    nodes: NodeFigures
    stragglers: Sequence[str]
    changed: Sequence[ConfigKey]
    """Keys that differ from their defaults."""
    usual: Sequence[ConfigKey]
    checkpoints: Sequence[CheckpointRow]
    provenance: Mapping[str, Any]
    data: Mapping[str, Any]
    reproduce: str
    go_on: str
    against: Mapping[str, Any] | None = None
    """The object of `everstep compare --json`, or null."""


def collect(folder: RunFolder, against: RunFolder | None = None, ask: Statuses = statuses) -> RunReport:
    """Collect the facts of a run.

    Raises:
        EverstepError: a folder has no config, or records that everstep cannot have written.
    """
    with one_line(folder):
        return _collect(folder, against, ask)


def _collect(folder: RunFolder, against: RunFolder | None, ask: Statuses) -> RunReport:
    config, found = _config(folder), status_of(folder, ask)
    status, numbers = found.facts(), [each.number for each in found.line.history.attempts]
    timeline, curves = view(folder, found.line.history, found.goodput), read_curves(folder, numbers)
    nodes, events = node_figures(folder, numbers), _stragglers(folder, numbers)
    metric = config.evaluate.metric
    best = best_of(dict(comparison.figures(folder, metric, config.evaluate.goal.value)), metric)
    provenance = folder.facts(PROVENANCE)
    changed, usual = config_keys(config)
    return RunReport(
        FORMAT,
        __version__,
        time.time(),
        found.line.history.name,
        sentence(status, timeline.attempts, best),
        figures(status, timeline.attempts, best),
        advice(status, config, best, curves, nodes, last_straggler(events)),
        status,
        PARTS,
        timeline,
        curves,
        logged(folder, numbers),
        nodes,
        list(dict.fromkeys(str(event.get("line") or "") for event in events)),
        changed,
        usual,
        checkpoints(folder, config.checkpoint, config.evaluate.goal),
        provenance,
        folder.facts(DATA),
        _command(provenance),
        _go_on(found),
        _against(folder, against),
    )


def _config(folder: RunFolder) -> RunConfig:
    try:
        return thaw(folder.storage.read(CONFIG))
    except FileNotFoundError as error:
        raise EverstepError(f"{folder.url} has no {CONFIG}: no run was composed there") from error


def config_keys(config: RunConfig) -> tuple[list[ConfigKey], list[ConfigKey]]:
    """Return the keys that differ from their defaults, with these, and the others."""
    defaults = dict(leaves(plain(RunConfig())))
    keys = list(leaves(plain(config)))
    changed = [ConfigKey(key, value, defaults.get(key)) for key, value in keys if defaults.get(key) != value]
    return changed, [ConfigKey(key, value) for key, value in keys if defaults.get(key) == value]


def _stragglers(folder: RunFolder, numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [e for number in numbers for e in folder.lines(number, EVENTS) if e.get("event") == "straggler"]


def _command(provenance: Mapping[str, Any]) -> str:
    words = provenance.get("command")
    return shlex.join(map(str, words)) if isinstance(words, list) else ""


def _go_on(found: StatusReport) -> str:
    return f"everstep resume {shlex.quote(found.line.history.url)}"


def _against(folder: RunFolder, other: RunFolder | None) -> dict[str, Any] | None:
    if other is None:
        return None
    pair = [folder, other]
    return {"runs": [each.url for each in pair], **comparison.compare(*map(comparison.readable, pair))}

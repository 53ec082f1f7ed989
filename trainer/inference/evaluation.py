"""`everstep evaluate`: metrics of a checkpoint on a whole set, with intervals and slices."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from everstep.errors import ConfigError
from everstep.outcome import to_json_line
from everstep.run_folder import RESULT
from everstep.storage import open_storage
from everstep.trainer.build import digest_of
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.inference.evaluation_table import show
from everstep.trainer.inference.intervals import interval, paired_interval
from everstep.trainer.inference.measure import Measurement, measure
from everstep.trainer.inference.session import Session, join_ranks, load_sets, open_session, read_config
from everstep.trainer.inference.slices import slices


def evaluate(options: argparse.Namespace) -> int:
    """Run the verb on this rank; rank 0 writes and shows the result."""
    run = read_config(options.work, options)
    mesh = join_ranks(run)
    splits, sets = load_sets(run, mesh, options.on)
    session = open_session(run, mesh, options.source, options.which)
    found = {name or options.on: measure(session, data) for name, data in sets.items()}
    record: dict[str, Any] = {
        "time": time.time(),
        "checkpoint": session.checkpoint,
        "step": session.step,
        "weights": run.evaluate.weights.value,
        "on": options.on,
        "data_digest": digest_of(splits),
        "world": mesh.world,
        "sets": {name: _facts(measured, run.seed) for name, measured in found.items()},
    }
    if options.by:
        for name, data in sets.items():
            record["sets"][name or options.on] |= {"by": options.by, "slices": _slices(session, data, options.by)}
    if options.against:
        record["against"] = _compared(session, sets, found, json.loads(options.against), options.on)
    if mesh.is_main:
        open_storage(options.work).write(RESULT, to_json_line(record))
        print(json.dumps(record, indent=2)) if options.json else show(record, f"{options.work}/{RESULT}")
    return 0


def _slices(session: Session, data: Fetcher, column: str) -> dict[str, Any]:
    parts: dict[str, Ids] = {}
    session.mesh.together(lambda: parts.update(slices(data, column)))
    return {label: _facts(measure(session, data, ids), session.run.seed) for label, ids in parts.items()}


def _facts(found: Measurement, seed: int) -> dict[str, Any]:
    """Return samples, and value and interval of each metric; a metric object has a value alone."""
    metrics: dict[str, Any] = {}
    for name, value in found.whole.values().items():
        blocks = found.blocks_of(name)
        limits = interval(*blocks, seed) if blocks is not None else None
        metrics[name] = {"value": value, **({"low": limits[0], "high": limits[1]} if limits else {})}
    left_out = {"left_out": found.whole.left_out} if found.whole.left_out else {}
    return {"samples": found.whole.samples, **left_out, "metrics": metrics}


def _compared(
    session: Session, sets: Mapping[str, Fetcher], mine: Mapping[str, Measurement], other: Mapping[str, str], on: str
) -> dict[str, Any]:
    """Return the metrics of another run's checkpoint on the same samples, and the differences."""
    config = read_config(
        other["config"],
        argparse.Namespace(frozen=other["config"], plugins=other["plugins"], config_digest=other["digest"]),
    )
    second = open_session(config, session.mesh, other["run"], other["which"])
    facts: dict[str, Any] = {"checkpoint": second.checkpoint, "step": second.step, "sets": {}}
    for name, data in sets.items():
        theirs = measure(second, data)
        differences = _differences(mine[name or on], theirs, session.run.seed)
        facts["sets"][name or on] = {**_facts(theirs, session.run.seed), "differences": differences}
    return facts


def _differences(mine: Measurement, theirs: Measurement, seed: int) -> dict[str, Any]:
    """Return mine - theirs for each metric that both measure."""
    ours, others = mine.whole.values(), theirs.whole.values()
    common = [name for name in ours if name in others]
    if not common:
        raise ConfigError(f"--against: the runs measure different things ({', '.join(ours)}; {', '.join(others)})")
    facts: dict[str, Any] = {name: {"value": ours[name] - others[name]} for name in common}
    for name in common:
        first, second = mine.blocks_of(name), theirs.blocks_of(name)
        if first is not None and second is not None and len(first[1]) == len(second[1]):
            limits = paired_interval(first, second, seed)
            facts[name] |= {"low": limits[0], "high": limits[1]} if limits else {}
    return facts

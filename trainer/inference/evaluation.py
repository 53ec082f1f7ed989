"""`everstep evaluate`: metrics of a checkpoint on a whole set, with intervals and slices."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from everstep.errors import ConfigError
from everstep.outcome import to_json_line
from everstep.storage import open_storage
from everstep.trainer.build import digest_of
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.inference.evaluation_table import show
from everstep.trainer.inference.intervals import interval, paired_interval
from everstep.trainer.inference.measure import BlockSums, block_size, measure
from everstep.trainer.inference.session import Session, close, join_ranks, load_sets, open_session, read_config
from everstep.trainer.inference.slices import slices

RESULT = "result.json"


def evaluate(options: argparse.Namespace) -> int:
    """Run the verb on this rank; rank 0 writes and shows the result."""
    run = read_config(options.work, options)
    mesh = join_ranks(run)
    splits, sets = load_sets(run, mesh, options.on)
    session = open_session(run, mesh, options.source, options.which)
    record: dict[str, Any] = {
        "time": time.time(),
        "checkpoint": session.checkpoint,
        "step": session.step,
        "weights": run.evaluate.weights.value,
        "on": options.on,
        "data_digest": digest_of(splits),
        "world": mesh.world,
        "sets": {name or options.on: _measured(session, data, options) for name, data in sets.items()},
    }
    if options.against:
        other = json.loads(options.against)
        record["against"] = _compared(record, run_sets=sets, session=session, other=other, options=options)
    for facts in record["sets"].values():
        facts.pop("blocks")
    if mesh.is_main:
        open_storage(options.work).write(RESULT, to_json_line(record))
        print(json.dumps(record, indent=2)) if options.json else show(record, f"{options.work}/{RESULT}")
    close(mesh)
    return 0


def _measured(session: Session, data: Fetcher, options: argparse.Namespace) -> dict[str, Any]:
    """Return metrics with intervals of one set and its slices."""
    run = session.run
    size = block_size(len(data.dataset), run.evaluate.batch or run.micro_batch)
    whole = measure(session, data, size)
    facts: dict[str, Any] = {"samples": whole.samples, "metrics": _facts(whole, run.seed), "blocks": whole}
    if options.by:
        facts["by"] = options.by
        facts["slices"] = {
            label: _slice(measure(session, part, block_size(len(part.dataset), size)), run.seed)
            for label, part in slices(data, options.by).items()
        }
    return facts


def _slice(found: BlockSums, seed: int) -> dict[str, Any]:
    return {"samples": found.samples, "metrics": _facts(found, seed)}


def _facts(found: BlockSums, seed: int) -> dict[str, Any]:
    """Return value and interval of each metric; a metric object has a value alone."""
    facts: dict[str, Any] = {}
    for name, value in found.values().items():
        facts[name] = {"value": value}
        if name in found.names:
            limits = interval(found.sums[:, found.names.index(name)], found.counts, seed)
            facts[name] |= {"low": limits[0], "high": limits[1]} if limits else {}
    return facts


def _compared(
    record: Mapping[str, Any],
    run_sets: Mapping[str, Fetcher],
    session: Session,
    other: Mapping[str, str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the metrics of another run's checkpoint on the same samples, and the differences."""
    config = read_config(
        other["config"],
        argparse.Namespace(frozen=other["config"], plugins=other["plugins"], config_digest=other["digest"]),
    )
    second = open_session(config, session.mesh, other["run"], other["which"])
    facts: dict[str, Any] = {"checkpoint": second.checkpoint, "step": second.step, "sets": {}}
    for name, data in run_sets.items():
        mine: BlockSums = record["sets"][name or options.on]["blocks"]
        size = block_size(len(data.dataset), session.run.evaluate.batch or session.run.micro_batch)
        theirs = measure(second, data, size)
        facts["sets"][name or options.on] = {
            "metrics": _facts(theirs, session.run.seed),
            "differences": _differences(mine, theirs, session.run.seed),
        }
    return facts


def _differences(mine: BlockSums, theirs: BlockSums, seed: int) -> dict[str, Any]:
    """Return mine - theirs for each metric that both measure."""
    ours, others = mine.values(), theirs.values()
    common = [name for name in ours if name in others]
    if not common:
        raise ConfigError(f"--against: the runs measure different things ({', '.join(ours)}; {', '.join(others)})")
    facts: dict[str, Any] = {name: {"value": ours[name] - others[name]} for name in common}
    for name in common:
        if name in mine.names and name in theirs.names:
            first = (mine.sums[:, mine.names.index(name)], mine.counts)
            second = (theirs.sums[:, theirs.names.index(name)], theirs.counts)
            limits = paired_interval(first, second, seed)
            facts[name] |= {"low": limits[0], "high": limits[1]} if limits else {}
    return facts

"""`everstep predict`: predictions of a task on a whole set, each sample exactly once, in Parquet.

A part holds fixed samples, whatever the number of processes, and is written whole or not at all. So a prediction that
was killed goes on with the parts that are missing, on any number of processes, and the rows are the same.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everstep.errors import ConfigError, DataError, printable
from everstep.outcome import to_json_line
from everstep.storage import Storage, open_storage
from everstep.trainer.build import digest_of
from everstep.trainer.data.columns import Ragged
from everstep.trainer.data.fetcher import Fetcher, MicrobatchRequest
from everstep.trainer.inference.progress import Progress
from everstep.trainer.inference.session import Session, close, join_ranks, load_sets, open_session, read_config
from everstep.trainer.random_state import microbatch_seed, seed_generators
from everstep.trainer.task_calls import inputs

PLAN, DONE = "plan.json", "done.json"
ID = "sample"
"""Column of the sample's number in the set."""


def predict(options: argparse.Namespace) -> int:
    """Run the verb on this rank; each rank writes its share of the missing parts."""
    run = read_config(options.work, options)
    mesh = join_ranks(run)
    splits, sets = load_sets(run, mesh, options.on)
    if len(sets) > 1:
        raise ConfigError(f"--on {options.on}: that is {', '.join(sets)}; predict one of them")
    (data,) = sets.values()
    session = open_session(run, mesh, options.source, options.which)
    if not callable(getattr(session.task, "predict", None)):
        kind = type(session.task).__name__
        raise ConfigError(
            f"the task {kind} has no predict: give it a method predict(model, batch) that returns a dict of tensors "
            "with a row for each sample"
        )
    storage, out = open_storage(options.work), open_storage(options.out)
    plan = {
        "checkpoint": session.checkpoint,
        "weights": run.evaluate.weights.value,
        "on": options.on,
        "data_digest": digest_of(splits),
        "samples": len(data.dataset),
        "rows": options.rows,
        "batch": run.evaluate.batch or run.micro_batch,
    }
    mesh.decide(lambda: _agree(storage, plan))
    _write_missing(session, data, out, plan)
    if mesh.is_main:
        parts = math.ceil(plan["samples"] / plan["rows"])
        storage.write(DONE, to_json_line({**plan, "parts": [part_name(part) for part in range(parts)]}))
        print(printable(f"{plan['samples']} predictions of {session.checkpoint} in {parts} parts in {options.out}"))
    close(mesh)
    return 0


def part_name(part: int) -> str:
    return f"part-{part:06d}.parquet"


def _agree(storage: Storage, plan: dict[str, Any]) -> None:
    """Write the plan, or check that the parts which are there follow the same one."""
    if storage.create(PLAN, to_json_line(plan)):
        return
    found = json.loads(storage.read(PLAN))
    differs = [key for key in plan if found.get(key) != plan[key]]
    if differs:
        key = differs[0]
        raise ConfigError(
            f"{storage.url} is of predictions with {key}={found.get(key)}, not {plan[key]}; choose another out="
        )


def _write_missing(session: Session, data: Fetcher, out: Storage, plan: Mapping[str, Any]) -> None:
    """Write the parts that are not there; ranks take them in turn."""
    mesh = session.mesh
    parts = range(math.ceil(plan["samples"] / plan["rows"]))

    def find() -> list[int]:
        there = set(out.names())
        return [part for part in parts if part_name(part) not in there]

    missing = mesh.decide(find)
    progress = Progress("parts written", len(missing), shown=mesh.is_main)
    for turn in range(math.ceil(len(missing) / mesh.world)):
        mine = turn * mesh.world + mesh.rank
        # A sharded model needs all ranks in each pass, so a rank without a part repeats the last one.
        part = missing[min(mine, len(missing) - 1)]
        table = _predicted(session, data, part, plan)
        if mine < len(missing):
            out.write(part_name(part), table)
        progress(min((turn + 1) * mesh.world, len(missing)))
        mesh.gather(part)  # the ranks stay together, since passes of a sharded model are collective


def _predicted(session: Session, data: Fetcher, part: int, plan: Mapping[str, Any]) -> bytes:
    """Return a part as a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    start = part * plan["rows"]
    stop = min(start + plan["rows"], plan["samples"])
    tables = [pa.table(columns) for columns in _batches(session, data, start, stop, plan["batch"])]
    file = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables), file)
    return file.getvalue()


def _batches(session: Session, data: Fetcher, start: int, stop: int, batch: int) -> Iterator[dict[str, Any]]:
    device, cast = session.mesh.device, session.model.cast
    with session.evaluating():
        for first in range(start, stop, batch):
            ids = np.arange(first, min(first + batch, stop))
            found = data(MicrobatchRequest(ids, np.zeros_like(ids), 0))
            moved = {name: value.to(device) for name, value in found.batch.items()}
            seed_generators(microbatch_seed(data.seed, 0, first), device)
            with session.model.autocast():
                given = session.task.predict(session.model.module, inputs(moved, cast))  # type: ignore[attr-defined]
            rows = found.ids if found.real else found.ids[:0]
            yield {ID: rows, **_columns(given, len(found.ids), len(rows))}


def _columns(given: Any, samples: int, kept: int) -> dict[str, Any]:
    """Return predictions as columns of Arrow: a number for each sample, or a list of numbers.

    Raises:
        DataError: they are no dict of tensors with a row for each sample.
    """
    if not isinstance(given, Mapping) or not given:
        raise DataError(
            f"task.predict returned a {type(given).__name__}: return a dict of tensors, {{name: [samples, …]}}"
        )
    if ID in given:
        raise DataError(f"task.predict returned a column {ID!r}: that is the number of the sample; rename it")
    return {str(name): _column(str(name), value, samples, kept) for name, value in given.items()}


def _column(name: str, value: Any, samples: int, kept: int) -> Any:
    import pyarrow as pa

    if isinstance(value, Ragged) and len(value) == samples:
        return pa.array([value[row].cpu().numpy() for row in range(kept)])
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != samples:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"task.predict returned {name!r} as {shape}: return a tensor with {samples} rows, one a sample")
    rows = value.detach()[:kept].cpu()
    numbers = (rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows).numpy()
    if numbers.ndim == 1:
        return pa.array(numbers)
    flat = pa.array(numbers.reshape(-1))
    for size in reversed(numbers.shape[1:]):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat

"""`everstep predict`: predictions of a task on a whole set, each sample exactly once, in Parquet.

A part holds fixed samples, whatever the number of processes, and is written whole or not at all. So a prediction that
was killed goes on with the parts that are missing, on any number of processes, and the rows are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from everstep.errors import ConfigError, DataError, printable
from everstep.outcome import to_json_line
from everstep.storage import Storage, open_storage
from everstep.trainer.build import digest_of
from everstep.trainer.data.columns import Ragged
from everstep.trainer.data.fetcher import Fetcher, MicrobatchRequest
from everstep.trainer.inference.progress_line import ProgressLine
from everstep.trainer.inference.session import Session, join_ranks, load_sets, open_session, read_config
from everstep.trainer.task_calls import inputs

CHUNK, GROUP_BYTES = 1 << 20, 64 << 20
"""Bytes that are copied at a time, and after which a row group is written."""
POLL_S = 0.2
PLAN, DONE = "plan.json", "done.json"
ID = "sample"
"""Column of the sample's number in the set."""


def predict(options: argparse.Namespace) -> int:
    """Run the verb on this rank; each rank writes its share of the missing parts."""
    run = read_config(options.work, options)
    mesh = join_ranks(run)
    splits, sets = load_sets(run, mesh, options.on)
    session = open_session(run, mesh, options.source, options.which)
    mesh.together(lambda: _check(session, sets, options.on))
    (data,) = sets.values()
    work, out = open_storage(options.work), open_storage(options.out)
    plan = {
        "checkpoint": session.checkpoint,
        "weights": run.evaluate.weights.value,
        "precision": run.precision.dtype.value,
        "on": options.on,
        "data_digest": digest_of(splits),
        "samples": len(data.dataset),
        "rows": options.rows,
        "batch": session.batch,
    }
    mesh.decide(lambda: _agree(work, out, plan))
    _write_missing(session, data, out, plan)
    if mesh.is_main:
        _finish(work, out, plan)
    return 0


def part_name(part: int) -> str:
    return f"part-{part:06d}.parquet"


def _check(session: Session, sets: Mapping[str, Fetcher], on: str) -> None:
    if len(sets) > 1:
        raise ConfigError(f"--on {on}: that is {', '.join(sets)}; predict one of them")
    if not callable(getattr(session.task, "predict", None)):
        kind = type(session.task).__name__
        raise ConfigError(
            f"the task {kind} has no predict: give it a method predict(model, batch) that returns a dict of tensors "
            "with a row for each sample"
        )


def _agree(work: Storage, out: Storage, plan: dict[str, Any]) -> None:
    """Write the plan, or check that the parts which are there follow the same one."""
    strangers = [name for name in out.names() if name.startswith("part-")]
    if not work.exists(PLAN) and strangers:
        raise ConfigError(f"--out {out.url}: {strangers[0]} is there, of an unknown prediction; choose another folder")
    if work.create(PLAN, to_json_line(plan)):
        return
    found = json.loads(work.read(PLAN))
    differs = [key for key in plan if found.get(key) != plan[key]]
    if differs:
        key = differs[0]
        raise ConfigError(
            f"--out {out.url}: its predictions are of {key}={found.get(key)}, not {plan[key]}; choose another folder"
        )


def _write_missing(session: Session, data: Fetcher, out: Storage, plan: Mapping[str, Any]) -> None:
    """Write the parts that are not there; ranks take them in turn.

    All ranks make equally many passes for a turn if the model is sharded, since its passes are collective.
    """
    mesh = session.mesh
    parts = range(_parts(plan))

    def find() -> list[int]:
        there = set(out.names())
        return [part for part in parts if part_name(part) not in there]

    missing = mesh.decide(find)
    progress = ProgressLine("parts written", len(missing), shown=mesh.is_main)
    for start in range(0, len(missing), mesh.world):
        turn = missing[start : start + mesh.world]
        part = turn[min(mesh.rank, len(turn) - 1)]
        passes = max(_passes(plan, each) for each in turn) if session.model.gathering else 0
        with tempfile.TemporaryFile() as file:
            _predict_part(session, data, part, plan, passes, file)
            if mesh.rank < len(turn):
                file.seek(0)
                with out.writer(part_name(part)) as target:
                    shutil.copyfileobj(file, target, CHUNK)
        progress(min(start + mesh.world, len(missing)))


def _finish(work: Storage, out: Storage, plan: Mapping[str, Any]) -> None:
    """Wait for the parts of the other ranks, and record that all are there."""
    names = [part_name(part) for part in range(_parts(plan))]
    while not set(names) <= set(out.names()):  # torchrun ends this process if another one dies
        time.sleep(POLL_S)
    work.write(DONE, to_json_line({**plan, "parts": names}))
    print(printable(f"{len(names)} parts of predictions for {plan['samples']} samples in {out.url}"))


def _parts(plan: Mapping[str, Any]) -> int:
    return -(-int(plan["samples"]) // int(plan["rows"]))


def _range(plan: Mapping[str, Any], part: int) -> range:
    return range(part * plan["rows"], min((part + 1) * plan["rows"], plan["samples"]))


def _passes(plan: Mapping[str, Any], part: int) -> int:
    return -(-len(_range(plan, part)) // int(plan["batch"]))


def _predict_part(
    session: Session, data: Fetcher, part: int, plan: Mapping[str, Any], passes: int, file: IO[bytes]
) -> None:
    """Write a part as a Parquet file, with at least so many passes."""
    import pyarrow as pa
    from pyarrow import parquet

    writer, tables = None, []
    for columns in _batches(session, data, _range(plan, part), plan["batch"], passes):
        tables.append(pa.table(columns))
        if sum(table.nbytes for table in tables) > GROUP_BYTES:
            writer = _write_group(writer, file, tables)
    if writer is None and not tables:  # no sample of the part can be decoded
        tables.append(pa.table({ID: pa.array([], pa.int64())}))
    if tables:
        writer = _write_group(writer, file, tables)
    assert isinstance(writer, parquet.ParquetWriter)
    writer.close()


def _write_group(writer: Any, file: IO[bytes], tables: list[Any]) -> Any:
    """Write the tables as one row group, and forget them; return the writer."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.concat_tables(tables)
    tables.clear()
    writer = writer or parquet.ParquetWriter(file, table.schema)
    writer.write_table(table)
    return writer


def _batches(session: Session, data: Fetcher, rows: range, batch: int, passes: int) -> Iterator[dict[str, Any]]:
    device = session.mesh.device
    every = [np.arange(first, min(first + batch, rows.stop)) for first in rows[::batch]]
    requests = [
        MicrobatchRequest(ids, np.zeros_like(ids), session.step + 1, rows.start + n) for n, ids in enumerate(every)
    ]
    done, last = 0, None
    with session.evaluating():
        for request, found in zip(requests, data.each(requests), strict=True):
            last = {name: value.to(device) for name, value in found.batch.items()}
            given = _passed(session, last, int(request.ids[0]))
            done += 1
            if found.real:
                yield {ID: found.ids, **_columns(given, len(found.ids))}
        for _ in range(passes - done):
            assert last is not None
            _passed(session, last, rows.start)


def _passed(session: Session, batch: dict[str, Tensor], first: int) -> Any:
    """Return what the task predicts; its randomness follows from the number of the first sample."""
    session.seed(first)
    with session.model.autocast():
        given = inputs(batch, session.model.cast)
        return session.task.predict(session.model.module, given)  # type: ignore[attr-defined]


def _columns(given: Any, samples: int) -> dict[str, Any]:
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
    return {str(name): _column(str(name), value, samples) for name, value in given.items()}


def _column(name: str, value: Any, samples: int) -> Any:
    import pyarrow as pa

    if isinstance(value, Ragged) and len(value) == samples:
        return pa.array([value[row].cpu().numpy() for row in range(samples)])
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != samples:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"task.predict returned {name!r} as {shape}: return a tensor with {samples} rows, one a sample")
    rows = value.detach().cpu()
    numbers = (rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows).numpy()
    if numbers.ndim == 1:
        return pa.array(numbers)
    flat = pa.array(numbers.reshape(-1))
    for size in reversed(numbers.shape[1:]):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat

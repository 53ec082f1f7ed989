"""`everstep explain`: attributions of samples as Parquet, with pictures and convergence deltas."""

from __future__ import annotations

import argparse
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from everstep.errors import ConfigError, printable
from everstep.outcome import to_json_line
from everstep.run_folder import RESULT
from everstep.storage import Storage, open_storage
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.explanation.attribution import Attribution, attribute
from everstep.trainer.explanation.model_inputs import model_inputs
from everstep.trainer.explanation.pictures import picture
from everstep.trainer.explanation.target import scores, targets
from everstep.trainer.export.recorded_call import call_of
from everstep.trainer.inference.session import Session, join_ranks, load_sets, open_session, read_config

ATTRIBUTIONS = "attributions.parquet"
LARGE = 0.05
"""Part of an output's change that attributions may lack without a line on it."""


def explain(options: argparse.Namespace) -> int:
    """Run the verb; the result is written last."""
    if importlib.util.find_spec("captum") is None:
        raise ConfigError("explain needs captum, which is not installed: pip install 'everstep[explain]'")
    run = read_config(options.work, options)
    mesh = join_ranks(run)
    _, sets = load_sets(run, mesh, options.on)
    if len(sets) > 1:
        raise ConfigError(f"--on {options.on}: that is {', '.join(sets)}; explain one of them")
    (data,) = sets.values()
    ids = _ids(options.samples, len(data.dataset))
    session = open_session(run, mesh, options.source, options.which)
    kept, target, found = _explained(session, data, ids, options)
    _refuse_nonfinite(kept, found)
    work = open_storage(options.work)
    pictures = _write(work, kept, target, found)
    facts = {
        "checkpoint": session.checkpoint,
        "step": session.step,
        "weights": run.evaluate.weights.value,
        "on": options.on,
        "method": options.method,
        "points": options.points,
        "samples": kept,
        "columns": {each.column: _completeness(each) for each in found},
    }
    work.write(RESULT, to_json_line(facts))
    _say(options, facts, pictures, work.url)
    return 0


def _ids(words: str, size: int) -> Ids:
    """Return the samples: the first N, or those of a list with commas."""
    try:
        numbers = [int(word) for word in words.split(",") if word.strip()]
    except ValueError:
        numbers = []
    ids = numbers if "," in words else [*range(min(numbers[0], size))] if numbers else []
    if not ids or len(set(ids)) != len(ids):
        raise ConfigError(f"--samples {words}: give a number of samples (8), or different ids with commas (3,17 or 3,)")
    if beyond := [one for one in ids if not 0 <= one < size]:
        raise ConfigError(f"--samples {words}: there is no sample {beyond[0]}; the set has 0 to {size - 1}")
    return np.array(ids)


def _explained(
    session: Session, data: Fetcher, ids: Ids, options: argparse.Namespace
) -> tuple[list[int], list[int], list[Attribution]]:
    """Return samples, the output of each that is explained, and the attributions of each input."""
    with session.evaluating():
        model = session.model.model.requires_grad_(False)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        dtype = torch.float32 if half else None  # the sums of a path need more digits than half precision has
        if dtype is not None:
            model.to(dtype)
        call, kept = call_of(session, data, ids, dtype)
        arguments = call.by_name(model)
        inputs = model_inputs(model, arguments, call.samples)
        session.seed(0)
        target = targets(scores(model(**arguments)), options.target)
        return kept, target.tolist(), [_one(session, model, arguments, each, target, options) for each in inputs]


def _one(
    session: Session, model: nn.Module, arguments: Any, given: Any, target: torch.Tensor, options: argparse.Namespace
) -> Attribution:
    session.seed(0)
    return attribute(model, arguments, given, target, options.method, options.points)


def _refuse_nonfinite(samples: Sequence[int], found: Sequence[Attribution]) -> None:
    """Raise ConfigError if an output or an attribution is NaN or Inf: sums of them say nothing."""
    for each in found:
        values = torch.cat(
            [each.values.reshape(len(samples), -1), each.output[:, None], each.baseline_output[:, None]], dim=1
        )
        bad = [sample for sample, fine in zip(samples, values.isfinite().all(dim=1).tolist(), strict=True) if not fine]
        if bad:
            raise ConfigError(
                f"--samples {','.join(map(str, bad))}: the model's output, or its gradient by {each.column}, is NaN or "
                "Inf there; choose other samples or another checkpoint"
            )


def _completeness(found: Attribution) -> dict[str, float]:
    """Return the largest delta, and the largest one relative to the change of the output."""
    least = 1e-4 * found.output.abs().clamp(min=1.0)  # a smaller change has no digits to compare
    change = torch.maximum((found.output - found.baseline_output).abs(), least)
    delta = found.delta.abs()
    return {"largest_delta": float(delta.max()), "largest_relative_delta": float((delta / change).max())}


def _write(work: Storage, samples: Sequence[int], target: Sequence[int], found: Sequence[Attribution]) -> int:
    """Write the table and the pictures; return the number of these."""
    import pyarrow as pa
    from pyarrow import parquet

    tables, pictures = [], 0
    places_type = pa.list_(pa.int64())
    for each in found:
        delta = each.delta.tolist()
        for row, sample in enumerate(samples):
            values = each.values[row].cpu()
            places = values.numel()
            raw = each.raw[row].cpu()
            tables.append(
                pa.table({
                    "sample": pa.array([sample] * places, pa.int64()),
                    "column": pa.array([each.column] * places),
                    "position": pa.array([list(place) for place in np.ndindex(*values.shape)], places_type),
                    "input": pa.array(raw.double().flatten().tolist(), pa.float64()),
                    "attribution": pa.array(values.double().flatten().tolist(), pa.float64()),
                    "target": pa.array([target[row]] * places, pa.int64()),
                    "output": pa.array([float(each.output[row])] * places, pa.float64()),
                    "baseline_output": pa.array([float(each.baseline_output[row])] * places, pa.float64()),
                    "delta": pa.array([delta[row]] * places, pa.float64()),
                })
            )  # fmt: skip
            title = f"sample {sample}: output {target[row]} is {float(each.output[row]):.3g}"
            title += f", and {float(each.baseline_output[row]):.3g} for an input of zeros"
            png = picture(title, each.column, raw, values) if each.raw.is_floating_point() else None
            if png is not None:
                work.write(f"{each.column}-{sample:08d}.png", png)
                pictures += 1
    file = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables), file)
    work.write(ATTRIBUTIONS, file.getvalue())
    return pictures


def _say(options: argparse.Namespace, facts: dict[str, Any], pictures: int, url: str) -> None:
    print(printable(f"{facts['checkpoint']}: {options.method} of {len(facts['samples'])} samples"))
    for column, one in facts["columns"].items():
        line = f"{column}: attributions add up to the change of the output within {one['largest_delta']:.3g}"
        if one["largest_relative_delta"] > LARGE and options.method == "integrated_gradients":
            line += f", {one['largest_relative_delta']:.0%} of it; --points {4 * options.points} comes closer"
        elif one["largest_relative_delta"] > LARGE:
            line += f", {one['largest_relative_delta']:.0%} of it; --method integrated_gradients is complete"
        print(printable(line))
    print(printable(f"{pictures} pictures and {ATTRIBUTIONS} in {url}"))

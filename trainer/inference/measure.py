"""Sums of what a task measures in each block of a set, from which intervals are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from everstep.trainer.data.fetcher import Fetcher, Microbatch
from everstep.trainer.data.loader import evaluation_batches
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.inference.progress_line import ProgressLine
from everstep.trainer.inference.session import Session
from everstep.trainer.task import Loss
from everstep.trainer.task_calls import checked, inputs
from everstep.trainer.torchmetrics_states import MetricStates, objects_of

BLOCKS = 200
"""Blocks that a set is divided into at least, as far as it has samples."""
SAME = 1e-3
"""Relative difference up to which blocks of another size count as rounding."""


@dataclass(frozen=True)
class BlockSums:
    """Sums that a task measures on a set, for each block of consecutive samples."""

    samples: int
    """Samples that were measured."""
    left_out: int
    """Samples that are excluded or cannot be decoded."""
    names: list[str]
    sums: NDArray[np.float64]
    """[blocks, names]: loss and metrics summed over the items of the block."""
    counts: NDArray[np.float64]
    """[blocks]: items."""
    objects: Mapping[str, float]
    """Values of metric objects over the whole set."""

    def values(self) -> dict[str, float]:
        """Return each metric as its sum divided by the items, NaN if there are none."""
        count = float(self.counts.sum())
        totals = self.sums.sum(axis=0)
        means = {n: float(t) / count if count else float("nan") for n, t in zip(self.names, totals, strict=True)}
        return {**means, **self.objects}


@dataclass(frozen=True)
class Measurement:
    """A set as training would measure it, and in blocks small enough for intervals."""

    whole: BlockSums
    fine: BlockSums

    def blocks_of(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return (sums, items) of the blocks; None where the value depends on which samples are in a block."""
        if name not in self.fine.names or name not in self.whole.names:
            return None
        value, other = self.whole.values()[name], self.fine.values()[name]
        if not abs(value - other) <= SAME * max(abs(value), abs(other)):
            return None
        return self.fine.sums[:, self.fine.names.index(name)], self.fine.counts


def measure(session: Session, data: Fetcher, ids: Ids | None = None) -> Measurement:
    """Evaluate a set, or some samples of it, on all ranks; their number changes no result."""
    chosen = np.arange(len(data.dataset)) if ids is None else ids
    chosen = chosen[: session.run.evaluate.limit]
    whole = _measured(session, data, chosen, session.batch)
    size = max(1, min(session.batch, len(chosen) // BLOCKS))
    return Measurement(whole, whole if size == session.batch else _measured(session, data, chosen, size))


def _measured(session: Session, data: Fetcher, ids: Ids, batch: int) -> BlockSums:
    """Evaluate each sample exactly once, `batch` of them in a pass."""
    mesh, run = session.mesh, session.run
    states, names = MetricStates(mesh), ["loss"]
    table = torch.zeros(0, dtype=torch.float64)
    progress = ProgressLine("samples evaluated", len(ids), shown=mesh.is_main)
    ahead = run.loader.ahead_mb
    with session.evaluating():
        for microbatch in evaluation_batches(data, batch, mesh.place, mesh.device, None, ahead, ids, session.step + 1):
            session.seed(microbatch.index)
            loss = _evaluated(session, microbatch)
            objects = objects_of(loss.metrics)
            if objects:
                states.add(objects, microbatch.index, microbatch.real)
            summed = {name: value for name, value in loss.metrics.items() if name not in objects}
            if not len(table):
                names = ["loss", *summed]
                table = torch.zeros(-(-len(ids) // batch), 2 + len(names), dtype=torch.float64, device=mesh.device)
            if microbatch.real:
                row = (len(microbatch.ids), loss.count, loss.sum, *summed.values())
                values = [torch.as_tensor(value, device=mesh.device) for value in row]
                table[microbatch.index] = torch.stack([value.detach().double() for value in values])
            progress(microbatch.index * batch)
    has_objects = any(mesh.gather(bool(states.metrics)))
    found = mesh.sum(table).cpu().numpy()
    kept = int(found[:, 0].sum())
    objects_found = states.values() if has_objects else {}
    return BlockSums(kept, len(ids) - kept, names, found[:, 2:], found[:, 1], objects_found)


def _evaluated(session: Session, microbatch: Microbatch) -> Loss:
    with session.model.autocast():
        given = inputs(microbatch.batch, session.model.cast)
        return checked(session.task.evaluate(session.model.module, given), "evaluate")

"""Sums of what a task measures in each block of a set, from which intervals are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.loader import evaluation_batches
from everstep.trainer.inference.progress import Progress
from everstep.trainer.inference.session import Session
from everstep.trainer.metric_states import MetricStates, objects_of
from everstep.trainer.random_state import microbatch_seed, seed_generators
from everstep.trainer.task_calls import checked, inputs

BLOCKS = 200
"""Blocks that a set is divided into at least, as far as it has samples."""


@dataclass(frozen=True)
class BlockSums:
    """Sums that a task measures on a set, for each block of consecutive samples."""

    samples: int
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


def block_size(samples: int, most: int) -> int:
    """Return the samples of a block: at most a batch, and few enough for BLOCKS blocks."""
    return max(1, min(most, samples // BLOCKS))


def measure(session: Session, data: Fetcher, batch: int) -> BlockSums:
    """Evaluate a whole set on all ranks, each sample exactly once; their number changes no result.

    Args:
        batch: samples of a block, which is one pass of the model.
    """
    mesh, run, cast = session.mesh, session.run, session.model.cast
    states, names = MetricStates(mesh), ["loss"]
    samples = len(data.dataset)
    table = torch.zeros(0, dtype=torch.float64)
    progress = Progress("samples evaluated", samples, shown=mesh.is_main)
    with session.evaluating():
        for microbatch in evaluation_batches(data, batch, mesh.place, mesh.device, None, run.loader.ahead_mb):
            seed_generators(microbatch_seed(data.seed, 0, microbatch.index), mesh.device)
            with session.model.autocast():
                loss = checked(session.task.evaluate(session.model.module, inputs(microbatch.batch, cast)), "evaluate")
            objects = objects_of(loss.metrics)
            if objects:
                states.add(objects, microbatch.index, microbatch.real)
            summed = {name: value for name, value in loss.metrics.items() if name not in objects}
            if not len(table):
                names = ["loss", *summed]
                table = torch.zeros(-(-samples // batch), 1 + len(names), dtype=torch.float64, device=mesh.device)
            if microbatch.real:
                values = [torch.as_tensor(v, device=mesh.device) for v in (loss.count, loss.sum, *summed.values())]
                table[microbatch.index] = torch.stack([value.detach().double() for value in values])
            progress(microbatch.index * batch)
    has_objects = any(mesh.gather(bool(states.metrics)))
    found = mesh.sum(table).cpu().numpy()
    return BlockSums(samples, names, found[:, 1:], found[:, 0], states.values() if has_objects else {})

"""Training with the tools that `debug` asks for."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from everstep.config import RunConfig
from everstep.outcome import Ending, Outcome
from everstep.trainer.debug.anomaly import anomalies_named
from everstep.trainer.debug.determinism import check
from everstep.trainer.debug.overfit import FallingLoss

if TYPE_CHECKING:
    from everstep.trainer.loop import Parts


def train_debugged(run: RunConfig, parts: Parts, train: Callable[[RunConfig, Parts], Ending]) -> Ending:
    """Train as `train` does, with the checks that `run.debug` asks for."""
    config = run.debug
    falling = FallingLoss(config.overfit) if config.overfit is not None else None
    if falling is not None:
        parts = dataclasses.replace(parts, hooks=parts.hooks.plus("debug.overfit", falling))
    named = anomalies_named(parts.step.parallel.model) if config.anomaly else contextlib.nullcontext()
    with named:
        if config.determinism and parts.state.progress.step < run.steps:
            check(parts)
        ending = train(run, parts)
    if falling is not None and ending.outcome is Outcome.done:
        falling.check()
    return ending

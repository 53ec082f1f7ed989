"""Training on a few batches again and again: a model and a loss that fit together get it down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from everstep.errors import DivergedError
from everstep.trainer.data.fetcher import Microbatch
from everstep.trainer.data.loader import Loader
from everstep.trainer.step_info import StepInfo

FALLEN = 0.9
"""Fraction of the first loss below which the last one counts as fallen."""


class RepeatingLoader(Loader):
    """Loader that yields the batches of the first steps again and again."""

    def __init__(self, batches: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.batches = batches

    def steps(self, first_step: int) -> Iterator[list[Microbatch]]:
        kept = list(itertools.islice(super().steps(0), self.batches))
        self.close()  # its threads have nothing more to fetch
        while True:
            yield kept[first_step % self.batches]
            first_step += 1


class FallingLoss:
    """Hook that keeps the losses, and raises DivergedError at the end of the run if they have not fallen."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.losses: list[float] = []

    def __call__(self, info: StepInfo) -> None:
        self.losses.append(info.loss)

    def check(self) -> None:
        """Compare the first and the last losses over all the batches."""
        if len(self.losses) < 2 * self.batches:
            return
        first, last = _mean(self.losses[: self.batches]), _mean(self.losses[-self.batches :])
        if not last < first - abs(first) * (1 - FALLEN):
            raise DivergedError(
                f"debug.overfit={self.batches}: the loss went from {first:.4g} to {last:.4g} in {len(self.losses)} "
                "steps on the same batches; look at the learning rate, the labels, and what of the model is frozen"
            )


def _mean(losses: Sequence[float]) -> float:
    return math.fsum(losses) / len(losses)

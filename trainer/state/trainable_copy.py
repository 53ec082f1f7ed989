"""Trainable copy of a task's model and optimizer on one process, for trials before a run's first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from everstep.trainer.data.rng_discovery import own_generators
from everstep.trainer.optim import has_modes
from everstep.trainer.optimizers.alternating import turns_of
from everstep.trainer.random_state import microbatch_seed, seed_generators, seed_own
from everstep.trainer.state.train_state import Progress, TrainState
from everstep.trainer.task import Loss, Task
from everstep.trainer.task_calls import inputs, loss_of
from everstep.trainer.torchmetrics_states import drop

MOST_OBJECTS = 1_000_000
"""Objects of a model or task that are searched, once, for generators of their own."""


class Trainable:
    """Weights of the run's seed, whole on one device, and the state that a checkpoint would hold."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        seed: int,
        cast: torch.dtype | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Prepare training of `model` on `device`; `cast` is the type of a batch's floats, None leaves them."""
        self.task, self.model, self.optimizer, self.device = task, model, optimizer, device
        self.seed, self.cast, self.autocast = seed, cast, autocast
        self.state = TrainState(self.model, self.optimizer, Progress(), plugins={"task": task})
        if has_modes(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]
        self.turns = turns_of(optimizer)
        self.last_loss = torch.zeros(())
        self._generators = own_generators(self.model, task, most=MOST_OBJECTS)

    def inputs(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return inputs(batch, self.cast)

    def loss(self, batch: Mapping[str, Tensor], step: int) -> Loss:
        """Return the task's loss of a microbatch, with the random numbers of the first one of a step."""
        seed = microbatch_seed(self.seed, step, 0)
        seed_generators(seed, self.device)
        seed_own(self._generators, seed)
        with self.autocast():
            turn = None if self.turns is None else self.turns.turn(self._tried(step))
            found = loss_of(self.task, self.model, self.inputs(batch), turn)
        drop(found.metrics)
        return found

    def trained(self, step: int) -> list[Tensor]:
        """Return the parameters that a step of a trial trains."""
        if self.turns is None:
            return [p for p in self.model.parameters() if p.requires_grad]
        return self.turns.parameters(self.turns.turn(self._tried(step)))

    def update(self, step: int) -> None:
        """Apply the gradients of a step, those of its turn alone."""
        if self.turns is not None:
            self.turns.check_gradients(self._tried(step))
            self.turns.keep(self._tried(step))
        self.optimizer.step()

    def _tried(self, step: int) -> int:
        """Return the step whose turn a step of a trial takes: each in a row, since a trial is short."""
        assert self.turns is not None
        steps = list(self.turns.first_steps)
        return steps[(step - 1) % len(steps)]

    def train(self, batches: Sequence[Mapping[str, Tensor]], first: int, last: int) -> None:
        """Take the steps from `first` to `last`, step n with the n-th microbatch."""
        for step in range(first, last + 1):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(batches[(step - 1) % len(batches)], step)
            loss.sum.backward()  # type: ignore[no-untyped-call]
            self.update(step)
            self.last_loss = loss.sum.detach()

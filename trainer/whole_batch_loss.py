"""Losses over the whole global batch, such as contrastive ones, in the memory of a microbatch.

The features of all microbatches are computed without a graph and gathered; the loss of all of them gives the gradient
of each feature; then each microbatch computes its features again, with a graph, and passes its part of the gradients
back (GradCache: Gao et al. 2021, arXiv:2101.06983). So the loss does not depend on `micro_batch` or the world.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.data.fetcher import Microbatch
from everstep.trainer.distributed.parallel import ParallelModel
from everstep.trainer.state.preserve import preserved
from everstep.trainer.task import Batch, Loss
from everstep.trainer.task_calls import checked, inputs

LOSS_INDEX = 1 << 40
"""Index, beyond those of microbatches, that seeds random numbers of the loss itself."""


@runtime_checkable
class WholeBatchTask(Protocol):
    """A task with a loss of the whole global batch; its `loss` is that of one microbatch, for checks."""

    def features(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return tensors [samples, …] of one microbatch; all that the loss needs of the model is in them."""
        ...

    def batch_loss(self, features: Mapping[str, Tensor]) -> Loss:
        """Return the loss of the samples of the global batch, in their order, from their features alone."""
        ...


@dataclass(frozen=True)
class _Part:
    """Share of a microbatch in the loss of the whole batch."""

    gradients: Mapping[str, Tensor]
    loss: Loss


class WholeBatch:
    """Loss of each microbatch of a step, as its share of the loss of all."""

    def __init__(self, task: WholeBatchTask, parallel: ParallelModel, seed: Callable[[int, int], None]) -> None:
        """`seed` seeds the generators for a step and an index of a microbatch."""
        self.task = task
        self.parallel = parallel
        self.seed = seed
        self._parts: dict[int, _Part] = {}

    def prepare(self, step: int, batches: Sequence[Microbatch], rewind: Callable[[], None]) -> None:
        """Compute the gradients of the features of all microbatches of a step; all ranks call it together.

        Args:
            rewind: sets buffers as they were at the start of the step, before each pass.
        """
        own: list[Mapping[str, Tensor]] = []
        with preserved(self.parallel.model, self.task), torch.no_grad():
            for microbatch in batches:
                self.seed(step, microbatch.index)
                rewind()
                own.append(self._features(microbatch.batch))
        pieces = self._gathered(own, batches)
        order = sorted((index, place) for place, (index, real, _) in enumerate(pieces) if real)
        rows = [len(next(iter(pieces[place][2].values()))) for _, place in order]
        names = sorted(own[0])
        whole = {name: torch.cat([pieces[place][2][name] for _, place in order]) for name in names}
        for value in whole.values():
            value.requires_grad_(value.is_floating_point())
        self.seed(step, LOSS_INDEX)
        with self.parallel.autocast():
            loss = checked(self.task.batch_loss(whole), "batch_loss")
        if not self._parts:
            _refuse_parameters(loss.sum, list(whole.values()))
        loss.sum.backward()  # type: ignore[no-untyped-call]
        self._parts = _parts(whole, loss, [index for index, _ in order], rows)

    def loss(self, batch: Batch, index: int) -> Loss:
        """Return a loss with the gradient of the whole batch's loss by this microbatch, and its share of it."""
        features = self._features(batch)
        if (part := self._parts.get(index)) is None:  # padding, which has the weight zero
            return Loss(sum((value.sum() for value in features.values()), torch.zeros((), device=self._device)), 1)
        back = sum(
            ((features[name] * gradient).sum() for name, gradient in part.gradients.items()),
            torch.zeros((), device=self._device),
        )
        return Loss(back + (part.loss.sum - back.detach()), part.loss.count, part.loss.metrics)

    @property
    def _device(self) -> torch.device:
        return self.parallel.mesh.device

    def _features(self, batch: Batch) -> Mapping[str, Tensor]:
        with self.parallel.autocast():
            found = self.task.features(self.parallel.module, inputs(batch, self.parallel.cast))
        rows = {len(value) for value in found.values() if isinstance(value, Tensor) and value.ndim}
        if len(rows) != 1 or any(not isinstance(value, Tensor) or not value.ndim for value in found.values()):
            raise ConfigError("task.features must return tensors [samples, …], all with the samples of the microbatch")
        return found

    def _gathered(
        self, own: Sequence[Mapping[str, Tensor]], batches: Sequence[Microbatch]
    ) -> list[tuple[int, bool, Mapping[str, Tensor]]]:
        """Return index, True if it is no padding, and features of the microbatches of all ranks."""
        heads = [
            (each.index, int(each.real), len(next(iter(found.values()))))
            for each, found in zip(batches, own, strict=True)
        ]
        if self.parallel.mesh.world == 1:
            return [(i, bool(real), found) for (i, real, _), found in zip(heads, own, strict=True)]
        world = self.parallel.mesh.world
        every = [torch.zeros(len(heads), 3, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(every, torch.tensor(heads))  # on the CPU part of the group: the host waits for no device
        described = [tuple(head) for rank in every for head in rank.tolist()]
        most = max(rows for _, _, rows in described)
        found: list[dict[str, Tensor]] = [{} for _ in described]
        for name in sorted(own[0]):
            padded = torch.stack([_padded(each[name], most) for each in own])
            parts = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(parts, padded)
            for place, value in enumerate(torch.cat(parts)):
                found[place][name] = value[: described[place][2]]
        return [(index, bool(real), found[place]) for place, (index, real, _) in enumerate(described)]


def _refuse_parameters(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """Raise ConfigError if the loss uses a parameter beside the features: each rank would add to it."""
    known, seen, left = {id(leaf) for leaf in leaves}, set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(variable := getattr(node, "variable", loss)) not in known and variable is not loss:
            raise ConfigError(
                f"task.batch_loss uses a parameter {list(variable.shape)} that is not in the features: multiply it "
                "into them in task.features (a temperature), so that its gradient is that of the whole batch"
            )
        left += [following for following, _ in node.next_functions]


def _padded(value: Tensor, rows: int) -> Tensor:
    return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])


def _parts(whole: Mapping[str, Tensor], loss: Loss, indices: Sequence[int], rows: Sequence[int]) -> dict[int, _Part]:
    """Return the share of each microbatch, by its number of samples, with its rows of the gradients."""
    gradients = {name: value.grad for name, value in whole.items() if value.grad is not None}
    split = {name: torch.split(value, list(rows)) for name, value in gradients.items()}
    found = {}
    for number, (index, count) in enumerate(zip(indices, rows, strict=True)):
        share = count / sum(rows)
        metrics = {name: torch.as_tensor(value).detach() * share for name, value in loss.metrics.items()}
        part = Loss(loss.sum.detach() * share, torch.as_tensor(loss.count) * share, metrics)
        found[index] = _Part({name: value[number] for name, value in split.items()}, part)
    return found

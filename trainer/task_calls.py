"""Calls of a task: the batch that it gets, checks of the Loss that it returns, and the metrics in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everstep.errors import ConfigError, nearest
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.task import Batch, Loss
from everstep.trainer.torchmetrics_states import MetricStates, drop, objects_of


class Inputs(dict[str, Tensor]):
    """A microbatch; a column that it lacks is a ConfigError, since the data does not fit the task."""

    def __missing__(self, name: str) -> Tensor:
        raise ConfigError(
            f"a batch has {', '.join(self)}, and the task asks for {name!r}: "
            f"choose data= and task= that go together{nearest(name, self)}"
        )


def inputs(batch: Mapping[str, Tensor], cast: torch.dtype | None) -> Inputs:
    """Return the batch with its floats as `cast`, the type of the model's weights if that is not fp32."""
    if cast is None:
        return Inputs(batch)
    return Inputs({name: value.to(cast) if value.is_floating_point() else value for name, value in batch.items()})


def loss_of(task: Any, model: nn.Module, batch: Batch, turn: str | None) -> Loss:
    """Return the loss of a microbatch; `turn` names the optimizer whose turn it is, None without turns."""
    return checked(task.loss(model, batch) if turn is None else task.loss(model, batch, turn=turn), "loss")


def check_takes_turns(task: Any, turns: bool) -> None:
    """Raise ConfigError unless the task's loss takes a turn just if the optimizer has `turns`."""
    try:
        parameters = inspect.signature(task.loss).parameters
    except (TypeError, ValueError):  # a function in C, which has no signature
        return
    found = parameters.get("turn")
    name = type(task).__name__
    if turns and hasattr(task, "batch_loss"):
        raise ConfigError(f"optimizer.turns: {name} has a loss of the whole batch, which takes no turn; write a loss")
    if turns and found is None and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"optimizer.turns: the loss of {name} takes no turn; write loss(self, model, batch, turn), "
            "which gets the name of the optimizer whose turn it is"
        )
    if not turns and found is not None and found.default is found.empty:
        raise ConfigError(f"task: the loss of {name} needs a turn; give it optimizers that alternate, {ALTERNATE}")


ALTERNATE = "'optimizer=alternating' with optimizer.optimizers and optimizer.turns"


def checked(loss: object, method: str) -> Loss:
    """Return the result of a task's method, if it is a Loss with a scalar sum and a count.

    Raises:
        ConfigError: it is something else; the message says what to return.
    """
    if not isinstance(loss, Loss):
        raise ConfigError(
            f"task.{method} returned a {type(loss).__name__}: return Loss(sum=…, count=…), the loss summed over the "
            "items and their number; a mean over n items is Loss(mean * n, n)"
        )
    if not isinstance(loss.sum, Tensor) or loss.sum.numel() != 1:
        shape = list(loss.sum.shape) if isinstance(loss.sum, Tensor) else type(loss.sum).__name__
        raise ConfigError(f"task.{method} returned Loss(sum={shape}): sum must be one number; add up the items")
    for name, value in loss.metrics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ConfigError(
                f"task.{method} returned a metric {name!r} of shape {list(value.shape)}: a metric is one number, "
                "summed over the items; give each cell a name of its own, or make one number of them"
            )
        if not isinstance(value, NUMBERS) and not objects_of({name: value}):
            if not isinstance(value, nn.Module):
                raise ConfigError(
                    f"task.{method} returned a {type(value).__name__} as metric {name!r}: return a number summed over "
                    "the items, or an object of torchmetrics"
                )
            raise ConfigError(
                f"task.{method} returned a {type(value).__name__} as metric {name!r}: return its metrics one by one, "
                "{**MetricCollection(…, compute_groups=False)}"
            )
    return loss


def float64_advice(model: nn.Module, batch: Mapping[str, Tensor], error: Exception) -> str:
    """Return the change to make if a pass failed on float64 columns; empty if it failed otherwise."""
    doubles = [name for name, column in batch.items() if column.dtype is torch.float64]
    if not doubles or "ouble" not in str(error) or any(p.dtype is torch.float64 for p in model.parameters()):
        return ""
    return (
        f"{', '.join(doubles)} are float64 and the model's weights are not: set data.cast={{{doubles[0]}: float32}}, "
        "or convert them in the dataset"
    )


def sparse_advice(model: nn.Module, error: Exception) -> str:
    """Return the change to make if an optimizer failed on sparse gradients; empty if it failed otherwise."""
    found = {name: p.grad.is_sparse for name, p in model.named_parameters() if p.grad is not None}
    sparse = [name for name, is_sparse in found.items() if is_sparse]
    if not sparse or not ("parse" in str(error) or "dense" in str(error)):
        return ""
    adam = "torch.optim.SparseAdam, " if len(sparse) == len(found) else ""
    return (
        f"{', '.join(sparse)} have sparse gradients: use sparse=False, {adam}torch.optim.Adagrad with weight_decay=0, "
        "or torch.optim.SGD with weight_decay=0, momentum=0 and nesterov=false"
    )


NUMBERS = (Tensor, int, float, np.generic, np.ndarray)
"""Types of a metric that is a sum."""
FLAGS = 2
"""Numbers before the metrics of a step: 1 for new names, and 1 for objects."""
_NAMES = "kind step time loss lr norm items samples unit items_per_s steps_per_s data_wait memory_mb mfu"
TAKEN = frozenset(_NAMES.split())
"""Names of a training record's own entries."""


class TaskMetrics:
    """Sums and counts of the metrics of a step. All ranks hold the same names in the same order.

    Names are agreed on at the first microbatch, and at the first one of each turn of optimizers that alternate. A name
    that appears later is counted from the next step on. Objects of torchmetrics measure the steps that are recorded.
    """

    def __init__(self, mesh: Mesh, recorded: Callable[[int], bool] = lambda step: True) -> None:
        self.mesh = mesh
        self.recorded = recorded
        self.states: MetricStates | None = None
        """States of the objects in the present step; None if it is not recorded."""
        self.places: dict[str, int] = {}
        self._new: set[str] = set()
        self._turn: str | None = None
        self._agreed: set[str | None] = set()
        self._sums = torch.zeros(0)

    def begin(self, step: int, turn: str | None = None) -> None:
        """Set the sums to zero, at the beginning of a step; `turn` is the one of optimizers that alternate."""
        self._turn = turn
        self.states = MetricStates(self.mesh) if self.recorded(step) else None
        self._zero()

    def _zero(self) -> None:
        self._sums = torch.zeros(FLAGS + 2 * len(self.places), dtype=torch.float64, device=self.mesh.device)

    def add(self, loss: Loss, index: int, real: bool) -> None:
        """Add the metrics of a microbatch by its number; padding (`real` is False) counts for nothing."""
        objects = objects_of(loss.metrics)
        self._new |= loss.metrics.keys() - self.places.keys() - objects.keys()
        if self._turn not in self._agreed:
            self._agreed.add(self._turn)
            self._agree()
            self._zero()
        if objects:
            self._add_objects(objects, index, real)
        for name, value in loss.metrics.items():
            place = self.places.get(name)
            if real and place is not None and name not in objects:
                self._sums[place] += torch.as_tensor(value, device=self.mesh.device).detach().sum()
                self._sums[place + 1] += loss.count

    def _add_objects(self, objects: Mapping[str, Any], index: int, real: bool) -> None:
        if taken := sorted(objects.keys() & TAKEN):
            raise ConfigError(f"task.loss returned a metric {taken[0]!r}: a record has that already; rename it")
        if self.states is None:
            drop(objects)
        else:
            self.states.add(objects, index, real)

    def joined(self, sums: Tensor) -> Tensor:
        """Append flags for new names and for objects, and the metrics, to the sums, for one common reduction."""
        if self._new:
            self._sums[0] = 1.0
        if self.states is not None and self.states.metrics:
            self._sums[1] = 1.0
        return torch.cat([sums, self._sums])

    def values(self, states: MetricStates | None, values: Sequence[float]) -> dict[str, float]:
        """Return the mean of each metric that some item had, and the values of objects.

        All ranks call it for the same steps, since they agree on new names in it.

        Args:
            states: those of the step.
            values: values that `joined` appended, reduced; fewer than the names if some were new after it.
        """
        found = [(name, values[at : at + 2]) for name, at in self.places.items() if at < len(values)]
        if values[0]:
            self._agree()
        means = {name: total / count for name, (total, count) in found if count}
        return means | states.values() if states is not None and values[1] else means

    def _agree(self) -> None:
        new = {name for found in self.mesh.gather(sorted(self._new)) for name in found} - self.places.keys()
        if taken := sorted(new & TAKEN):
            raise ConfigError(f"task.loss returned a metric {taken[0]!r}: a record has that already; rename it")
        for name in sorted(new):
            self.places[name] = FLAGS + 2 * len(self.places)
        self._new.clear()

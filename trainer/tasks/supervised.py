"""Supervised training of any module with a loss function: what `everstep.train(model=…, loss=…)` runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError, nearest
from everstep.trainer.task import Batch, Loss

TOLERANCE = 0.02
"""Relative difference that rounding, also in half precision, may make."""
Measure = Callable[[Any, Tensor], Tensor]


class Supervised:
    """A module that gets some columns of a batch, and a loss of its output and another column.

    Args:
        build: returns the model.
        loss: of (output, target); a mean over the samples, as torch's losses give, or one value per sample.
        inputs: columns that the model is called with, in this order.
        target: column of the targets.
        metrics: functions of (output, target), with a mean or one value per sample, by name.
    """

    unit = "samples"

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss: Measure,
        inputs: Sequence[str] = ("features",),
        target: str = "target",
        metrics: Mapping[str, Measure] | None = None,
    ) -> None:
        self._build = build
        self._loss = loss
        self._inputs = list(inputs)
        self._target = target
        self._metrics = dict(metrics or {})

    def model(self) -> nn.Module:
        """Return the network, newly initialised."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss summed over the samples."""
        return self._measured(model, batch, {})

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss, and `accuracy` where the output has a column for each class of an integer target."""
        return self._measured(model, batch, self._metrics)

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `output`, that of the module; of a module with several outputs each by its number."""
        output = self._called(model, batch, self._inputs)
        if isinstance(output, Mapping):
            return dict(output)
        outputs = output if isinstance(output, list | tuple) else [output]
        return {"output" if len(outputs) == 1 else f"output_{n}": value for n, value in enumerate(outputs)}

    def _called(self, model: nn.Module, batch: Batch, needed: Sequence[str]) -> Any:
        """Return the module's output; ConfigError if the data lacks a column of `needed`."""
        for name in needed:
            if name not in batch:
                raise ConfigError(f"{name}: the data has no such column, but {', '.join(batch)}{nearest(name, batch)}")
        return model(*(batch[name] for name in self._inputs))

    def _measured(self, model: nn.Module, batch: Batch, metrics: Mapping[str, Measure]) -> Loss:
        output, target = self._called(model, batch, (*self._inputs, self._target)), batch[self._target]
        count = len(target)
        found = {name: _total(measure(output, target), count, name) for name, measure in metrics.items()}
        if metrics is self._metrics and _are_classes(output, target):
            found.setdefault("accuracy", (output.argmax(dim=1) == target).sum().to(output.dtype))
        loss = self._loss(output, target)
        if self not in _CHECKED and isinstance(output, Tensor) and isinstance(loss, Tensor) and count > 1:
            _CHECKED.add(self)
            _check_mean(self._loss, output.detach(), target, loss.detach())
        return Loss(_total(loss, count, "loss"), count, found)


_CHECKED: weakref.WeakSet[Supervised] = weakref.WeakSet()
"""Tasks whose loss has been found to be a mean over samples, in this process."""


@torch.no_grad()
def _check_mean(measure: Measure, output: Tensor, target: Tensor, whole: Tensor) -> None:
    """Raise ConfigError if a loss of one number is no mean over the samples."""
    half, count = len(target) // 2, len(target)
    if whole.numel() != 1 or len(output) != count or not torch.isfinite(whole):
        return
    parts = [(measure(output[part], target[part]), n) for part, n in (
        (slice(half), half), (slice(half, count), count - half)
    )]  # fmt: skip
    mean = sum(float(value) * n for value, n in parts) / count
    if not abs(mean - float(whole)) <= TOLERANCE * max(abs(mean), abs(float(whole)), 1e-6):  # also of a half with NaN
        raise ConfigError(
            f"loss: it gives {float(whole):.4g} for {count} samples and {mean:.4g} as the mean of their halves, so it "
            "is no mean over the samples (reduction='sum', class weights, ignored targets, a comparison of samples); "
            "return one value per sample: reduction='none'"
        )


def _total(value: Tensor, count: int, name: str) -> Tensor:
    """Return the sum over the samples of a mean, or of one value per sample."""
    if not isinstance(value, Tensor):
        raise ConfigError(f"{name} returned a {type(value).__name__}: return a tensor, a mean or one value per sample")
    if value.numel() == 1:
        return value.reshape(()) * count
    if value.ndim == 1 and len(value) == count:
        return value.sum()
    raise ConfigError(
        f"{name} returned the shape {list(value.shape)}: return a mean, or one value per sample [{count}]"
    )


def _are_classes(output: object, target: Tensor) -> bool:
    return isinstance(output, Tensor) and output.ndim == 2 and target.ndim == 1 and not target.is_floating_point()

"""Classification of tables."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from everstep.trainer.task import Batch, Loss
from everstep.trainer.tasks.classification import classification_loss, with_accuracy


class TabularClassifier:
    """Batches hold `features`: float32 [n, features], and `target`: int64 [n]."""

    unit = "rows"

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self._build = model

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy, summed over the samples."""
        return classification_loss(model(batch["features"]), batch["target"])

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss with `accuracy`."""
        return with_accuracy(model(batch["features"]), batch["target"])

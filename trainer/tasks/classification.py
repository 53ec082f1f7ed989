"""Classification of images and of tables: loss and accuracy, summed over samples."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from everstep.trainer.task import Batch, Loss


class Classifier:
    """Batches hold a column of inputs, and one of labels: int64 [n]."""

    inputs: str
    labels: str

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self._build = model

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy, summed over the samples."""
        return classification_loss(model(batch[self.inputs]), batch[self.labels])

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss with `accuracy`, and `baseline_accuracy` of the column `baseline`, labels, if any."""
        labels = batch[self.labels]
        loss = with_accuracy(model(batch[self.inputs]), labels)
        if (baseline := batch.get("baseline")) is None:
            return loss
        right = (baseline == labels).sum().to(loss.sum.dtype)
        return Loss(loss.sum, loss.count, {**loss.metrics, "baseline_accuracy": right})

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `label`, the most likely class [n], and `probability` of each class [n, classes]."""
        logits = model(batch[self.inputs])
        return {"label": logits.argmax(dim=1), "probability": logits.softmax(dim=1)}


class ImageClassifier(Classifier):
    """Batches hold `image`: float32 [n, channels, h, w], and `label`: int64 [n]."""

    unit, inputs, labels = "images", "image", "label"


class TabularClassifier(Classifier):
    """Batches hold `features`: float32 [n, features], and `target`: int64 [n]."""

    unit, inputs, labels = "rows", "features", "target"


def classification_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Return the cross entropy in nats summed over the samples; logits [n, classes], labels int64 [n]."""
    return Loss(F.cross_entropy(logits, labels, reduction="sum"), len(labels))


def with_accuracy(logits: Tensor, labels: Tensor) -> Loss:
    """Return the loss, and the number of correctly classified samples as metric `accuracy`."""
    loss = classification_loss(logits, labels)
    correct = (logits.argmax(dim=1) == labels).sum()
    return Loss(loss.sum, loss.count, {"accuracy": correct.to(loss.sum.dtype)})

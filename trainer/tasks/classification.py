"""Loss and accuracy of classifiers, summed over samples."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from everstep.trainer.task import Loss


def classification_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Return the cross entropy in nats summed over the samples; logits [n, classes], labels int64 [n]."""
    return Loss(F.cross_entropy(logits, labels, reduction="sum"), len(labels))


def with_accuracy(logits: Tensor, labels: Tensor) -> Loss:
    """Return the loss, and the number of correctly classified samples as metric `accuracy`."""
    loss = classification_loss(logits, labels)
    correct = (logits.argmax(dim=1) == labels).sum()
    return Loss(loss.sum, loss.count, {"accuracy": correct.to(loss.sum.dtype)})

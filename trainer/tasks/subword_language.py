"""Language modelling over subwords, in packed documents that do not see each other, measured per byte."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from everstep.errors import DataError
from everstep.trainer.task import Batch, Loss
from everstep.trainer.tasks.language import ModelFactory, counted_targets

COLUMNS = ("tokens", "segments", "positions", "bytes")


class SubwordLanguageModel:
    """Batches hold `tokens`, `segments`, `positions` and `bytes`, integers [n, block + 1].

    The model is called with tokens, segments and positions, so that attention stays within a document. The items are
    bytes, not tokens: losses in nats per byte compare with those of any other vocabulary, and of a byte model.
    """

    unit = "bytes"

    def __init__(self, model: ModelFactory) -> None:
        self._build = model

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy in nats, summed over the predicted tokens, and the number of their bytes."""
        losses, lengths = _measured(model, batch)
        return Loss(losses.sum(), lengths.sum())

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss with `bits_per_byte`, and that of the baseline if the data has `baseline_bits`."""
        losses, lengths = _measured(model, batch)
        total = losses.sum()
        metrics = {"bits_per_byte": total / math.log(2)}
        if "baseline_bits" in batch:
            metrics["baseline_bits_per_byte"] = (batch["baseline_bits"][:, 1:] * (lengths > 0)).sum()
        return Loss(total, lengths.sum(), metrics)

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` in nats per predicted byte [n], and `bytes`, the number of these [n]."""
        losses, lengths = _measured(model, batch)
        return {"loss": losses.sum(dim=1) / lengths.sum(dim=1), "bytes": lengths.sum(dim=1)}


def _measured(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return loss in nats and bytes of each target, [n, block]; both are zero where a document begins."""
    if lacking := [name for name in COLUMNS if name not in batch]:
        raise DataError(f"data: this task needs the column {lacking[0]!r}; the data has {', '.join(batch)}")
    tokens = batch["tokens"].long()
    targets = tokens[:, 1:]
    logits = model(tokens[:, :-1], batch["segments"][:, :-1], batch["positions"][:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    counted = counted_targets(batch, targets.shape[1])
    assert counted is not None  # there are segments
    return losses * counted, batch["bytes"][:, 1:] * counted

"""A contrastive task: its loss is of all pairs of the global batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep import Batch, Loss
from support.toy import WIDTH, Block


class PairModel(nn.Module):
    """Two towers, and a temperature that is trained."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.left = nn.Linear(WIDTH, 4)
        self.right = nn.Linear(1, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        left, right = F.normalize(self.left(x), dim=1), F.normalize(self.right(y[:, None]), dim=1)
        return {"left": left * self.scale.exp(), "right": right}


class PairTask:
    unit = "pairs"

    def __init__(self, dropout: float = 0.3) -> None:
        self.dropout = dropout

    def model(self) -> nn.Module:
        return PairModel(self.dropout)

    def features(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return model(batch["x"], batch["y"])

    def batch_loss(self, features: Mapping[str, Tensor]) -> Loss:
        logits = features["left"] @ features["right"].T
        own = torch.arange(len(logits), device=logits.device)
        right = (logits.argmax(1) == own).sum().to(logits.dtype)
        loss = F.cross_entropy(logits, own, reduction="sum") + F.cross_entropy(logits.T, own, reduction="sum")
        return Loss(loss / 2, len(logits), {"recall": right})

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return self.batch_loss(self.features(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        return self.loss(model, batch)


class TemperatureTask(PairTask):
    """Its loss uses a parameter of the model directly."""

    def model(self) -> nn.Module:
        self.made = super().model()
        return self.made

    def batch_loss(self, features: Mapping[str, Tensor]) -> Loss:
        found = super().batch_loss(features)
        return Loss(found.sum * self.made.scale, found.count)


class MistakenTask(PairTask):
    def features(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"left": model(batch["x"], batch["y"])["left"].mean()}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return self.batch_loss(super().features(model, batch))

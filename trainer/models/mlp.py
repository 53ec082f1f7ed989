"""A multilayer perceptron for tables."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Features float32 [n, features] -> logits [n, classes]."""

    def __init__(self, features: int, classes: int, width: int = 64, depth: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(features if level == 0 else width, width), nn.GELU(), nn.Dropout(dropout))
            for level in range(depth)
        )
        self.head = nn.Linear(width if depth else features, classes)

    def forward(self, features: Tensor) -> Tensor:
        hidden = features
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits

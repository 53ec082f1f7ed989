"""The smallest task that has everything which could go wrong: blocks, dropout, a norm, held-out data, sums."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep import ArrayDataset, Batch, Loss, Splits, StepInfo, uniform

WIDTH = 6


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.gelu(self.linear(self.norm(x))))


class ToyModel(nn.Module):
    def __init__(self, depth: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("shift", torch.full((1,), 0.25), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.shift)[:, 0]


class ToyTask:
    """Regression; `max_batch` and `nan_value` make it fail as hardware does."""

    unit = "samples"

    def __init__(
        self, depth: int = 2, dropout: float = 0.3, max_batch: int | None = None, nan_value: float | None = None
    ) -> None:
        self.depth = depth
        self.dropout = dropout
        self.max_batch = max_batch
        self.nan_value = nan_value

    def model(self) -> nn.Module:
        return ToyModel(self.depth, self.dropout)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if self.max_batch is not None and len(batch["y"]) > self.max_batch:
            raise torch.OutOfMemoryError(f"{len(batch['y'])} samples do not fit")
        loss = F.mse_loss(model(batch["x"]), batch["y"], reduction="sum")
        if self.nan_value is not None and (batch["x"][:, 0] == self.nan_value).any():
            loss = loss * float("nan")
        return Loss(loss, len(batch["y"]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        error = model(batch["x"]) - batch["y"]
        return Loss(error.square().sum(), len(batch["y"]), {"mae": error.abs().sum()})


class EmptyTask(ToyTask):
    """A model without parameters."""

    def model(self) -> nn.Module:
        return nn.Identity()


def jitter(batch: dict[str, Tensor], keys: np.ndarray) -> dict[str, Tensor]:
    noise = torch.from_numpy(uniform(keys, 0).astype(np.float32))
    return {**batch, "x": batch["x"] + 0.01 * noise[:, None]}


def toy_data(samples: int = 41, seed: int = 0) -> Splits:
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(samples + 13, WIDTH)).astype(np.float32)
    y = np.sin(x.sum(axis=1)).astype(np.float32)
    columns = {"x": x, "y": y}
    train, held_out = ({name: column[part] for name, column in columns.items()}
                       for part in (slice(0, samples), slice(samples, None)))  # fmt: skip
    return Splits(ArrayDataset(train), ArrayDataset(held_out), jitter)


def plain_data(samples: int = 41, seed: int = 0) -> Splits:
    """Without augmentation."""
    splits = toy_data(samples, seed)
    return Splits(splits.train, splits.validation)


def slow_hook(seconds: float, step: int) -> Callable[[StepInfo], None]:
    """A hook that takes its time on rank 0 alone, from a step on."""

    def hook(info: StepInfo) -> None:
        if info.step >= step and os.environ.get("RANK", "0") == "0":
            time.sleep(seconds)

    return hook

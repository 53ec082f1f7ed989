"""What every contestant trains: 100,928 parameters on cheap data in memory, batches of 32 samples a process."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.clock import GAPS, TICKER, WARMUP

FEATURES, WIDTH, CLASSES = 72, 256, 64
BATCH = 32
LR, CLIP, LOG_EVERY = 1e-3, 1.0, 10
STEPS = WARMUP + GAPS + 1
"""A gap needs the tick that ends it, hence one step more."""
SAMPLES = int(os.environ.get("BENCH_SAMPLES", "65536"))
"""Enough for one epoch, so that nobody pays for a change of epochs."""


class Net(nn.Sequential):
    """A perceptron whose forward pass in training ticks the clock: from tick to tick is one whole step."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            TICKER.tick()
        scores: Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return scores


def arrays() -> tuple[Tensor, Tensor]:
    """Features float32 [SAMPLES, FEATURES] and classes int64 [SAMPLES]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, FEATURES, generator=generator), torch.randint(CLASSES, (SAMPLES,), generator=generator)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The arrays as a map-style dataset that gathers a whole batch at once: the cheapest that a DataLoader can have."""

    def __init__(self) -> None:
        self.features, self.target = arrays()

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index], self.target[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self.features[rows], self.target[rows]


def as_it_comes(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate function: `Batches` has put the batch together already."""
    return batch


def cosine(step: int) -> float:
    """The learning rate's factor: 10 steps of warm-up, then a cosine to 0.1; what Everstep's config says too."""
    import math

    if step < 10:
        return (step + 1) / 10
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 10) / max(1, STEPS - 10))))


def scratch() -> Path:
    """Where a contestant may write: its log of losses, its run folder."""
    return Path(os.environ["BENCH_SCRATCH"])


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))

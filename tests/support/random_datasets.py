"""Datasets as people bring them: map-style, with transforms that draw random numbers from wherever such code does."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from random import random as python_random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everstep.trainer.data.dataset import Splits
from everstep.trainer.data.ordering.weighted import balanced

WIDTH = 6
OF_MODULE = np.random.default_rng()


def by_torch() -> float:
    return float(torch.rand(()))


def by_numpy() -> float:
    return float(np.random.normal())


def by_python() -> float:
    return random.gauss(0, 1) + python_random()


def by_module() -> float:
    return float(OF_MODULE.random())


class Flip:
    """A transform with a generator that it made itself, as albumentations' have."""

    def __init__(self) -> None:
        self.random_generator, self.py_random = np.random.default_rng(), random.Random()

    def __call__(self) -> float:
        return self.py_random.random() + float(self.random_generator.random())


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self) -> float:
        return sum(transform() for transform in self.transforms)


class Slotted:
    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = np.random.RandomState()

    def __call__(self) -> float:
        return float(self.state.rand())


class Layer(nn.Module):
    """A transform that is a module, as torchvision's are."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()
        self.generator.seed()

    def forward(self) -> float:
        return float(torch.rand((), generator=self.generator))


class OfClass:
    shared = Compose(Flip())

    def __call__(self) -> float:
        return self.shared()


def by_closure() -> Callable[[], float]:
    own = random.Random()
    return lambda: own.random()


def scaled(own: random.Random, factor: float) -> float:
    return own.random() * factor


SOURCES: Mapping[str, Callable[[], Callable[[], float]]] = {
    "torch": lambda: by_torch,
    "numpy": lambda: by_numpy,
    "python": lambda: by_python,
    "module": lambda: by_module,
    "own": lambda: Compose(Flip(), Compose(Flip(), Slotted())),
    "layer": Layer,
    "class": OfClass,
    "closure": by_closure,
    "partial": lambda: partial(scaled, random.Random(), factor=2.0),
}


class Drawing(torch.utils.data.Dataset[dict[str, Tensor]]):
    """`x` is noisy, `y` is not; `thrown_away` draws and does not use what it drew."""

    def __init__(self, samples: int = 41, kind: str = "torch", thrown_away: bool = False) -> None:
        self.x = np.random.default_rng(0).normal(size=(samples, WIDTH)).astype(np.float32)
        self.transform = SOURCES[kind]()
        self.scale = 0.0 if thrown_away else 0.1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.from_numpy(self.x[index])
        return {"x": x + self.scale * self.transform(), "y": x.sum().sin(), "label": torch.tensor(index % 3)}


class Quiet(Drawing):
    """The same samples, and nothing drawn."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.from_numpy(self.x[index])
        return {"x": x, "y": x.sum().sin(), "label": torch.tensor(index % 3)}


class RaggedDrawing(Drawing):
    """Each sample is a vector of its own, random length."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.rand(1 + int(np.random.randint(WIDTH))), "y": torch.tensor(float(index))}


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collate function of torch's DataLoader, which draws too."""
    x = torch.rand(len(samples), WIDTH) * random.random() * np.random.rand()
    for row, sample in enumerate(samples):
        x[row, : len(sample["x"])] = sample["x"]
    return {"x": x, "y": torch.stack([sample["y"] for sample in samples])}


def global_jitter(batch: dict[str, Tensor], keys: np.ndarray) -> dict[str, Tensor]:
    """An augmentation that does not look at its keys."""
    return {**batch, "x": batch["x"] + 0.01 * torch.randn_like(batch["x"]) + np.random.rand() + random.random()}


def drawing(kind: str = "torch", thrown_away: bool = False) -> Splits:
    return Splits(Drawing(kind=kind, thrown_away=thrown_away), Drawing(13, kind), global_jitter)


def thrown_away() -> Splits:
    return Splits(Drawing(thrown_away=True))


def quiet() -> Splits:
    return Splits(Quiet())


def ragged() -> Splits:
    return Splits(
        RaggedDrawing(), {"a": RaggedDrawing(5), "b": RaggedDrawing(3)}, collate_fn=padded, test=RaggedDrawing(7)
    )


def drawn_evenly() -> Splits:
    data = Drawing()
    return Splits(balanced(data, [min(index, 3) for index in range(len(data))]))


def bare() -> Any:
    """Not even in Splits."""
    return Drawing()


class OpensItsFile(Quiet):
    """Opens a file when it is first read, as people do so that each worker has one of its own."""

    opened_by = 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.opened_by = self.opened_by or os.getpid()
        if self.opened_by != os.getpid():
            raise RuntimeError("reads a file at another process's offset")
        return super().__getitem__(index)


def opens_its_file() -> Splits:
    return Splits(OpensItsFile(), OpensItsFile(13))


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter([1])


def stream() -> Any:
    return Stream()


class Clocked(Drawing):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor(time.perf_counter_ns())}


def clocked() -> Any:
    return Clocked()

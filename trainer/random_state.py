"""Seeds of the training step: global generators and those of model and task, by step and microbatch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from everstep.trainer.data.ordering.permutation import GOLDEN, mix_int
from everstep.trainer.data.randomness import seed_generator
from everstep.trainer.data.rng_discovery import Generator


def microbatch_seed(seed: int, step: int, index: int) -> int:
    """Return a seed for dropout and the like in one microbatch, the same on any rank."""
    return _mix(_mix(_mix(seed) ^ step) ^ index) >> 1


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of torch, NumPy (which takes 32 bits) and Python."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def seed_own(generators: Iterable[Generator], seed: int) -> None:
    """Seed the generators that `own_generators` found, each with another number."""
    for number, generator in enumerate(generators):
        seed_generator(generator, _mix(seed ^ (number + 1)) >> 1)


def _mix(value: int) -> int:
    """Return one round of splitmix64 (Steele, Lea, Flood 2014).

    It makes unrelated seeds of adjacent numbers.
    """
    return mix_int(value + GOLDEN)


@contextlib.contextmanager
def generators_preserved() -> Iterator[None]:
    """Restore the states of torch's, NumPy's and Python's global generators at the end."""
    python, array = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)

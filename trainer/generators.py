"""The generators that code of other people draws from: torch's, NumPy's and Python's, global or an object's own."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

MASK = 2**64 - 1


def mix(value: int) -> int:
    """One round of splitmix64 (Steele, Lea, Flood 2014): neighbouring numbers in, unrelated ones out."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def microbatch_seed(seed: int, step: int, index: int) -> int:
    """A seed for dropout and the like in one microbatch, the same on any rank."""
    return mix(mix(mix(seed & MASK) ^ step) ^ index) >> 1


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators; NumPy's takes 32 bits."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def find_generators(things: Iterable[object]) -> list[Any]:
    """Return the generators that objects keep as attributes; of a module, those of its inner modules too."""
    owners = [part for thing in things for part in (thing.modules() if isinstance(thing, nn.Module) else [thing])]
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    found = [value for owner in owners for value in _values(owner) if isinstance(value, kinds)]
    return list({id(each): each for each in found}.values())


def seed_own(generators: Iterable[Any], seed: int) -> None:
    """Seed generators that `find_generators` found, each with a number of its own."""
    for number, generator in enumerate(generators):
        own = mix(seed ^ (number + 1)) >> 1
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        else:
            generator.seed(own & 0xFFFFFFFF)


def _values(thing: object) -> list[Any]:
    attributes: Mapping[str, Any] = vars(thing) if hasattr(thing, "__dict__") else {}
    return list(attributes.values())

"""Random numbers of users' datasets, transforms and collates, seeded by the sample's key.

Such code draws from torch's, NumPy's and Python's global generators, or from one of its own. All of them are seeded
before each sample and restored after the microbatch: a sample is the same in every process and after every restart, and
the training step finds its generators unchanged. Global generators belong to the process, not to a thread, so code that
draws must not run in a thread beside the step (`draws`).
"""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.random import RandomState

from everstep.errors import DataError
from everstep.trainer.data.ordering.permutation import GOLDEN, Words, mix, mix_int
from everstep.trainer.data.rng_discovery import Generator, own_generators

Part = TypeVar("Part")
GLOBAL: tuple[Generator, ...] = (torch.default_generator, np.random.mtrand._rand, random._inst)
_MARK = "draws"


def draws_nothing(part: Part) -> Part:
    """Mark a class or function that draws from its keys alone, so that it may run in a thread."""
    setattr(part, _MARK, False)
    return part


def draws(part: object) -> bool:
    """True unless the function or the class itself is marked: a subclass of a marked class may draw."""
    while isinstance(part, functools.partial):
        part = part.func
    if part is None:
        return False
    home = part if isinstance(part, types.FunctionType) else type(part)
    return bool(getattr(part, _MARK, True)) if _MARK in vars(home) else True


def batch_key(keys: Words) -> int:
    """Return one key for all samples of a microbatch, in their order."""
    return int(np.bitwise_xor.reduce(mix(keys + np.arange(len(keys), dtype=np.uint64) * np.uint64(GOLDEN))))


class Randomness:
    """Global generators, and those that `parts` hold."""

    def __init__(self, *parts: object) -> None:
        known = {id(generator) for generator in GLOBAL}
        self._all = [*GLOBAL, *(found for found in own_generators(*parts) if id(found) not in known)]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._all.append(torch.cuda.default_generators[torch.cuda.current_device()])

    def seed(self, key: int, stream: int = 0) -> None:
        """Seed each generator with another number, which follows from the key and the stream."""
        for number, generator in enumerate(self._all):
            seed_generator(generator, mix_int(key + (stream * len(self._all) + number + 1) * GOLDEN))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Restore all generators at the end of the block.

        In the block torch has one thread, as in a worker, so that sums are the same.
        """
        restores, threads = [_restore(generator) for generator in self._all], torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for restore in restores:
                restore()


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seed the global generators for code that must draw the same at every start; restore them at the end."""
    randomness = Randomness()
    with randomness.kept():
        randomness.seed(key)
        yield


def seed_generator(generator: Generator, seed: int) -> None:
    """Seed one generator of any kind with 64 bits.

    Raises:
        DataError: the kind cannot be seeded.
    """
    try:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, random.Random):
            generator.seed(seed)
        elif isinstance(generator, RandomState):
            generator.seed(seed >> 32)  # ten times as fast as a list of two words
        else:
            bits = generator.bit_generator
            bits.state = type(bits)(seed).state
    except (TypeError, ValueError, NotImplementedError) as error:
        kind = getattr(getattr(generator, "_bit_generator", generator), "__class__", type(generator)).__name__
        raise DataError(
            f"a {kind} of the dataset, model or task cannot be seeded ({error}); use NumPy's default_rng"
        ) from error


def _restore(generator: Generator) -> Callable[[], Any]:
    """Return a function that restores the generator to its present state."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, RandomState):
        return functools.partial(generator.set_state, generator.get_state(legacy=False))
    return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)

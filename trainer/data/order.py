"""Which sample comes when: pure functions of (dataset size, seed, position), the same on every world.

Step s consumes the positions [s * global_batch, (s + 1) * global_batch). Position p is entry p % samples
of epoch p // samples; a batch may straddle epochs, and nothing is padded or dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import GOLDEN, MASK, KeyedPermutation, Words, mix, mix_int
from trainer.errors import ConfigError

Ids = NDArray[np.int64]

_ORDER_STREAM, _SAMPLE_STREAM = 0x6F72646572, 0x73616D706C65


@dataclass(frozen=True)
class SampleOrder:
    """The order of a run: from a position to its sample and back, in constant time at any position."""

    samples: int
    """Samples in the training set."""
    global_batch: int
    """Samples a step."""
    seed: int
    shuffle: bool = True
    """False: every epoch goes through the samples in their stored order."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError("data holds 0 training samples; choose a dataset with at least 1")
        _at_least_one("global_batch", self.global_batch)

    def ids(self, position: int, count: int) -> Ids:
        """The sample ids at positions [position, position + count): int64 [count]."""
        return self.at(position, np.arange(count))[1]

    def epochs(self, position: int, count: int) -> Ids:
        """The epochs of the same positions: int64 [count]."""
        return self.at(position, np.arange(count))[0]

    def at(self, position: int, offsets: NDArray[np.integer]) -> tuple[Ids, Ids]:
        """Epochs and sample ids, int64 like `offsets`, at the positions `position + offsets`.

        `position` may be any size; only the offsets (0 or more) need to fit into an array.
        """
        if position < 0:
            raise ValueError(f"a position is 0 or more, not {position}")
        first, entry = divmod(position, self.samples)
        turns, entries = np.divmod(offsets + np.int64(entry), np.int64(self.samples))
        epochs = turns + np.int64(first)
        if not self.shuffle or not entries.size:
            return epochs, entries
        if turns.min() == turns.max():
            keys: int | Words = self._epoch_key(first + int(turns.flat[0]))
        else:
            keys = self._epoch_keys(epochs.ravel())
        ids = KeyedPermutation(self.samples, keys).forward(entries.ravel())
        return epochs, ids.reshape(offsets.shape)

    def position_of(self, sample: int, epoch: int) -> int:
        """The one position at which `epoch` visits `sample`."""
        if not 0 <= sample < self.samples:
            raise ValueError(f"a sample is 0 to {self.samples - 1}, not {sample}")
        entry = sample
        if self.shuffle:
            permutation = KeyedPermutation(self.samples, self._epoch_key(epoch))
            entry = int(permutation.inverse(np.array([sample]))[0])
        return epoch * self.samples + entry

    def step_of(self, sample: int, epoch: int) -> int:
        """The step (from 0) that consumes `sample` in `epoch`."""
        return self.position_of(sample, epoch) // self.global_batch

    def _epoch_key(self, epoch: int) -> int:
        return mix_int(mix_int(self.seed * GOLDEN + _ORDER_STREAM) + epoch * GOLDEN)

    def _epoch_keys(self, epochs: Ids) -> Words:
        base = np.uint64(mix_int(self.seed * GOLDEN + _ORDER_STREAM))
        return mix(epochs.astype(np.uint64) * np.uint64(GOLDEN) + base)


def sample_keys(seed: int, epochs: Ids, ids: Ids) -> Words:
    """A hash for each (seed, epoch, sample), uint64 like `ids`, from which augmentation draws."""
    base = np.uint64(mix_int(seed * GOLDEN + _SAMPLE_STREAM))
    by_epoch = mix(epochs.astype(np.uint64) * np.uint64(GOLDEN) + base)
    return mix(ids.astype(np.uint64) * np.uint64(GOLDEN) + by_epoch)


def uniform(keys: Words, stream: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each key; another, independent one for each `stream`. Same shape as `keys`."""
    words = mix(keys + np.uint64(mix_int((stream + 1) * GOLDEN & MASK)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Slot(NamedTuple):
    """One microbatch of a rank: positions [start, stop) within the global batch."""

    index: int  # type: ignore[assignment]  # the field's word hides tuple.index, which nobody needs here
    """Which microbatch of the global batch; its random numbers are seeded by it."""
    start: int
    stop: int
    real: bool
    """False: a zero-weight pass of a rank that has none left, so that collectives match."""


def microbatches(global_batch: int, micro_batch: int, rank: int, world: int) -> list[Slot]:
    """The microbatches that `rank` of `world` works on in each step, equally many on every rank.

    The global batch is the fixed list of ceil(global_batch / micro_batch) microbatches, of which the last
    may be smaller; ranks take them in turn. A rank without one repeats the last with `real=False`.
    """
    _at_least_one("global_batch", global_batch)
    _at_least_one("micro_batch", micro_batch)
    total = -(-global_batch // micro_batch)
    slots = []
    for index in range(rank, -(-total // world) * world, world):
        real = index < total
        start = (index if real else total - 1) * micro_batch
        stop = min(start + micro_batch, global_batch)
        slots.append(Slot(index if real else total - 1, start, stop, real))
    return slots


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{key}={value} must be at least 1 sample")

"""Sample order: pure functions of (sizes of shards, seed, position), the same for every world size.

Step s consumes the positions [s * global_batch, (s + 1) * global_batch). With one dataset, position p is entry
p % samples of epoch p // samples; a batch may straddle epochs, and nothing is padded or dropped. A mixture assigns its
positions to its datasets in a fixed pattern, and each dataset has epochs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from everstep.config import OrderConfig
from everstep.errors import ConfigError
from everstep.trainer.data.ordering.interleave import Interleave, crossed, mix_pattern
from everstep.trainer.data.ordering.permutation import GOLDEN, MASK, Words, mix, mix_int
from everstep.trainer.data.ordering.source_order import SampleRange, SourceOrder

Ids = NDArray[np.int64]

_ORDER_STREAM, _SAMPLE_STREAM, _DRAW_STREAM = 0x6F72646572, 0x73616D706C65, 0x6472617773


@dataclass(frozen=True, eq=False)
class OrderSource:
    """A dataset as the order needs it."""

    rows: Sequence[int]
    """Samples of each shard, in stored order; one number if there are no shards."""
    share: Fraction = Fraction(1)
    """Share of all samples that a run uses; the shares of a run's sources sum to 1."""
    weights: NDArray[np.float64] | None = None
    """Weight of each sample, where an epoch is as many draws as samples; None visits each sample once."""
    lengths: NDArray[np.float64] | None = None
    """Length of each sample; None if it is not needed."""


class Draws:
    """Draws of a weighted source: the sample is a hash of the draw's number, so any draw can be computed."""

    def __init__(self, weights: NDArray[np.float64], seed: int) -> None:
        self._ends = np.cumsum(weights)
        self._last = int(np.flatnonzero(weights)[-1])
        self._seed = np.uint64(mix_int(seed + _DRAW_STREAM))

    def samples(self, draws: Ids) -> Ids:
        """Return the samples of draws, which are counted since the first epoch; int64 like `draws`."""
        chances = uniform(mix(draws.astype(np.uint64) * np.uint64(GOLDEN) + self._seed), 0)
        found = np.searchsorted(self._ends, chances * self._ends[-1], side="right")
        samples: Ids = np.minimum(found, self._last)  # the product may have been rounded up
        return samples


class SampleOrder:
    """The order of a run: from a position to its sample and back, in constant time at any position.

    Samples of several sources have consecutive ids: those of the second begin where the first's end.
    """

    def __init__(
        self,
        sources: int | Sequence[OrderSource],
        global_batch: int,
        seed: int,
        shuffle: bool = True,
        *,
        window: int | None = None,
        lanes: int = 1,
        lane_width: int = 1,
    ) -> None:
        """Prepare the order.

        Args:
            sources: the sources, or the number of samples of a single one.
            global_batch: samples per step.
            shuffle: False visits each source in its stored order, epoch after epoch.
            window: number of shards whose samples are mixed at a time, over all lanes; None mixes all.
            lanes: streams with shards of their own, which alternate every `lane_width` samples within a batch.
        """
        if isinstance(sources, int):
            sources = [OrderSource([sources])]
        for key, value in (("global_batch", global_batch), ("order.lanes", lanes), ("lane_width", lane_width)):
            _at_least_one(key, value)
        if window is not None:
            _at_least_one("order.window", window, "shard")
        self.sources = tuple(sources)
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle
        self.lanes = lanes
        base = mix_int(seed * GOLDEN + _ORDER_STREAM)
        self._orders = [
            SourceOrder(source.rows, base ^ mix_int(number * GOLDEN), window, lanes, shuffle)
            for number, source in enumerate(self.sources)
        ]
        self._draws = [
            None if source.weights is None else Draws(source.weights, base ^ mix_int(number * GOLDEN))
            for number, source in enumerate(self.sources)
        ]
        self.starts = np.cumsum([0, *(order.samples for order in self._orders)])
        """The first id of each source, and the number of all ids."""
        for number, order in enumerate(self._orders):
            if order.samples < 1:
                which = f" in source {number} of data.mix" if len(self.sources) > 1 else ""
                raise ConfigError(f"data holds 0 training samples{which}; choose a dataset with at least 1")
        mixture = mix_pattern([source.share for source in self.sources])
        self._mix = Interleave(mixture, len(self.sources))
        self._lanes = Interleave(crossed(mixture, lanes, lane_width), len(self.sources) * lanes) if lanes > 1 else None
        self._stretches = lru_cache(maxsize=64)(self._find_stretches)

    @classmethod
    def of_config(
        cls, order: OrderConfig, sources: Sequence[OrderSource], global_batch: int, micro_batch: int, seed: int
    ) -> SampleOrder:
        """Return the order of a run; its lanes alternate every microbatch."""
        window, lanes = order.window, order.lanes
        return cls(sources, global_batch, seed, order.shuffle, window=window, lanes=lanes, lane_width=micro_batch)

    @property
    def samples(self) -> int:
        """Samples in all sources."""
        return int(self.starts[-1])

    def source_of(self, sample: int) -> OrderSource:
        return self.sources[int(np.searchsorted(self.starts, sample, side="right")) - 1]

    def ids(self, position: int, count: int) -> Ids:
        """Return the sample ids at positions [position, position + count): int64 [count]."""
        return self.at(position, np.arange(count))[1]

    def epochs(self, position: int, count: int) -> Ids:
        """Return the epochs of the same positions, each of its own source: int64 [count]."""
        return self.at(position, np.arange(count))[0]

    def at(self, position: int, offsets: NDArray[np.integer]) -> tuple[Ids, Ids]:
        """Return epochs and sample ids, int64 like `offsets`, at the positions `position + offsets`.

        For a weighted source the number of the draw replaces the epoch, since an epoch may draw a sample twice.
        `position` may be any size; only the offsets (0 or more) must fit into an array.
        """
        if position < 0:
            raise ValueError(f"a position is 0 or more, not {position}")
        flat = offsets.ravel().astype(np.int64, copy=False)
        if len(self.sources) == 1:
            epochs, ids = self._of_source(0, position, flat, position, flat)
        else:
            epochs, ids = self._of_mixture(position, flat)
        return epochs.reshape(offsets.shape), ids.reshape(offsets.shape)

    def _of_mixture(self, position: int, offsets: Ids) -> tuple[Ids, Ids]:
        mix = self._mix
        turn, rest = divmod(position, mix.period)
        turns, residues = np.divmod(offsets + np.int64(rest), np.int64(mix.period))
        sources = mix.pattern[residues]
        epochs, ids = np.empty_like(offsets), np.empty_like(offsets)
        for number in np.unique(sources).tolist():
            here = sources == number
            count = mix.counts[number]
            indices = turns[here] * np.int64(count) + mix.ranks[residues[here]]
            epochs[here], found = self._of_source(number, turn * count, indices, position, offsets[here])
            ids[here] = found + self.starts[number]
        return epochs, ids

    def _of_source(self, number: int, first: int, indices: Ids, position: int, offsets: Ids) -> tuple[Ids, Ids]:
        """Return epochs and samples of one source for its samples `first + indices`.

        They are at the positions `position + offsets` of the run.
        """
        epochs, ids = self._visited(number, first, indices, position, offsets)
        draws = self._draws[number]
        if draws is None:
            return epochs, ids
        numbers = epochs * np.int64(self._orders[number].samples) + ids
        return numbers, draws.samples(numbers)

    def _visited(self, number: int, first: int, indices: Ids, position: int, offsets: Ids) -> tuple[Ids, Ids]:
        order = self._orders[number]
        epoch, entry = divmod(first, order.samples)
        entries = indices + np.int64(entry)
        if not entries.size or int(entries.max()) < order.samples:
            epochs = np.full(len(entries), epoch)
        else:
            turns, entries = np.divmod(entries, np.int64(order.samples))
            epochs = turns + np.int64(epoch)
        if self._lanes is None and (order.whole or not order.shuffle):
            return epochs, order.anywhere(epochs, entries)
        ids = np.empty_like(entries)
        for turn in np.unique(epochs).tolist():
            here = epochs == turn
            if self._lanes is None:
                ids[here] = order.ids(turn, SampleRange(0, 0, order.samples), entries[here])
            else:
                ids[here] = self._in_lanes(self._lanes, number, turn, position, offsets[here])
        return epochs, ids

    def _in_lanes(self, lanes: Interleave, number: int, epoch: int, position: int, offsets: Ids) -> Ids:
        turn, rest = divmod(position, lanes.period)
        turns, residues = np.divmod(offsets + np.int64(rest), np.int64(lanes.period))
        streams = lanes.pattern[residues]
        ids = np.empty_like(offsets)
        for stream in np.unique(streams).tolist():
            here = streams == stream
            count = lanes.counts[stream]
            stretch, before = self._stretches(number, epoch)[stream % self.lanes]
            entries = turns[here] * np.int64(count) + lanes.ranks[residues[here]] + np.int64(turn * count - before)
            ids[here] = self._orders[number].ids(epoch, stretch, entries)
        return ids

    def _find_stretches(self, number: int, epoch: int) -> list[tuple[SampleRange, int]]:
        """Return for each lane its stretch of a source's epoch, and the lane's samples before that epoch."""
        lanes, samples = self._lanes, self._orders[number].samples
        if lanes is None:
            return [(SampleRange(0, 0, samples), epoch * samples)]
        first, end = (self._mix.position(number, (epoch + turn) * samples) for turn in (0, 1))
        found, start = [], 0
        for lane in range(self.lanes):
            stream = number * self.lanes + lane
            before = lanes.before(stream, first)
            length = lanes.before(stream, end) - before
            found.append((SampleRange(lane, start, length), before))
            start += length
        return found

    def position_of(self, sample: int, epoch: int) -> int:
        """Return the position at which the sample's source visits it for the `epoch`-th time, counted from 0.

        For a weighted source `sample` is a draw's number within the epoch, since draws have no inverse.
        """
        if not 0 <= sample < self.samples:
            raise ValueError(f"a sample is 0 to {self.samples - 1}, not {sample}")
        number = int(np.searchsorted(self.starts, sample, side="right")) - 1
        order = self._orders[number]
        place = order.place(sample - int(self.starts[number]), epoch)
        stretches = self._stretches(number, epoch)
        starts = [stretch.start + stretch.length for stretch, _ in stretches]
        stretch, before = stretches[int(np.searchsorted(starts, place, side="right"))]
        index = before + order.entry(place, epoch, stretch)
        if self._lanes is None:
            return self._mix.position(number, index)
        return self._lanes.position(number * self.lanes + stretch.lane, index)


def sample_keys(seed: int, epochs: Ids, ids: Ids) -> Words:
    """Return a hash for each (seed, epoch, sample), uint64 like `ids`, from which augmentation draws."""
    base = np.uint64(mix_int(seed * GOLDEN + _SAMPLE_STREAM))
    by_epoch = mix(epochs.astype(np.uint64) * np.uint64(GOLDEN) + base)
    return mix(ids.astype(np.uint64) * np.uint64(GOLDEN) + by_epoch)


def uniform(keys: Words, stream: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each key, independent for each `stream`; same shape as `keys`."""
    words = mix(keys + np.uint64(mix_int((stream + 1) * GOLDEN & MASK)))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class MicrobatchSlot(NamedTuple):
    """One microbatch of a rank: positions [start, stop) within the global batch."""

    index: int  # type: ignore[assignment]  # the field hides tuple.index, which is not needed here
    """Number of the microbatch in the global batch; its random numbers are seeded by it."""
    start: int
    stop: int
    real: bool
    """False: a zero-weight pass of a rank that has none left, so that collectives match."""


def microbatches(global_batch: int, micro_batch: int, rank: int, world: int) -> list[MicrobatchSlot]:
    """Return the microbatches that `rank` of `world` works on in each step, equally many on every rank.

    The global batch is the fixed list of ceil(global_batch / micro_batch) microbatches, of which the last may be
    smaller; ranks take them in turn. A rank without one repeats the last with `real=False`.
    """
    _at_least_one("global_batch", global_batch)
    _at_least_one("micro_batch", micro_batch)
    total = -(-global_batch // micro_batch)
    slots = []
    for index in range(rank, -(-total // world) * world, world):
        real = index < total
        start = (index if real else total - 1) * micro_batch
        stop = min(start + micro_batch, global_batch)
        slots.append(MicrobatchSlot(index if real else total - 1, start, stop, real))
    return slots


def _at_least_one(key: str, value: int, what: str = "sample") -> None:
    if value < 1:
        raise ConfigError(f"{key}={value} must be at least 1 {what}")

"""Order of one dataset per epoch: shards permuted in a line, samples permuted in windows of that line.

A window spans as many samples as `window` shards hold on average. So a reader of an epoch needs only about that many
shards at a time, and yet each batch draws from all of them. Lanes are consecutive stretches of the line, each with
windows of its own: a reader of some lanes needs only their shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from everstep.trainer.data.ordering.permutation import GOLDEN, MASK, KeyedPermutation, Words, mix, mix_int

Ints = NDArray[np.int64]

_SHARDS = 0x736861726473


class SampleRange(NamedTuple):
    """The part of an epoch's line that belongs to one lane."""

    lane: int
    start: int
    length: int


class SourceOrder:
    """Position of each sample on an epoch's line, and the entry that visits each position."""

    def __init__(self, rows: Sequence[int], seed: int, window: int | None, lanes: int, shuffle: bool) -> None:
        """Prepare the order; `rows` are the samples of each shard, `seed` is this dataset's own."""
        self.rows = np.asarray(rows, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.rows)])
        self.samples = int(self.starts[-1])
        self.shuffle = shuffle
        shards = len(self.rows)
        # In whole samples: the line has no gaps, so windows need not end where shards do.
        mixed = self.samples if window is None else -(-window * self.samples // (shards * lanes))
        self.window = min(self.samples, mixed)
        self.whole = shuffle and lanes == 1 and self.window >= self.samples
        """True if every epoch is one permutation of all samples; the order of the shards then has no effect."""
        self._seed = seed
        self._in_stored_order = not shuffle or shards == 1 or self.whole
        self._line = lru_cache(maxsize=4)(self._laid_out)

    def epoch_key(self, epoch: int) -> int:
        return mix_int(self._seed + epoch * GOLDEN)

    def anywhere(self, epochs: Ints, entries: Ints) -> Ints:
        """Return the samples at `entries` of several epochs, if `whole` or not shuffled; one-dimensional."""
        if not self.shuffle or not entries.size:
            return entries
        first, last = int(epochs.min()), int(epochs.max())
        key: int | Words = self.epoch_key(first)
        if first != last:
            key = mix(epochs.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(self._seed & MASK))
        return KeyedPermutation(self.samples, key).forward(entries)

    def ids(self, epoch: int, stretch: SampleRange, entries: Ints) -> Ints:
        """Return the samples that `entries` of a lane's stretch visit: int64 like `entries`, one-dimensional."""
        places = entries + np.int64(stretch.start)
        if self.shuffle and entries.size:
            windows, inside = np.divmod(entries, np.int64(self.window))
            places += self._shuffled(epoch, stretch, windows, inside) - inside
        return self._samples_at(epoch, places)

    def place(self, sample: int, epoch: int) -> int:
        """Return the position of a sample on the line of `epoch`."""
        if self._in_stored_order:
            return sample
        slots, ends = self._line(epoch)
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        slot = int(self._shard_permutation(epoch).inverse(np.array([shard]))[0])
        return int(ends[slot] - self.rows[slots[slot]] + sample - self.starts[shard])

    def entry(self, place: int, epoch: int, stretch: SampleRange) -> int:
        """Return the entry of a stretch that visits `place`: the inverse of `ids`."""
        entry = place - stretch.start
        if not self.shuffle:
            return entry
        window, inside = divmod(entry, self.window)
        size = min(self.window, stretch.length - window * self.window)
        permutation = KeyedPermutation(size, self._window_key(epoch, stretch.lane, window))
        return window * self.window + int(permutation.inverse(np.array([inside]))[0])

    def _shuffled(self, epoch: int, stretch: SampleRange, windows: Ints, inside: Ints) -> Ints:
        """Permute `inside` within each entry's window; only the last window of a stretch is smaller."""
        first, last = int(windows.min()), int(windows.max())
        if first == last:
            size = min(self.window, stretch.length - first * self.window)
            return KeyedPermutation(size, self._window_key(epoch, stretch.lane, first)).forward(inside)
        result = np.empty_like(inside)
        smaller = (windows + 1) * np.int64(self.window) > stretch.length
        full = ~smaller
        keys = self._window_keys(epoch, stretch.lane, windows[full])
        result[full] = KeyedPermutation(self.window, keys).forward(inside[full])
        if smaller.any():
            size = stretch.length - last * self.window
            key = self._window_key(epoch, stretch.lane, last)
            result[smaller] = KeyedPermutation(size, key).forward(inside[smaller])
        return result

    def _window_key(self, epoch: int, lane: int, window: int) -> int:
        return self.epoch_key(epoch) ^ mix_int(window * GOLDEN + mix_int(lane))

    def _window_keys(self, epoch: int, lane: int, windows: Ints) -> Words:
        mixed = mix(windows.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(mix_int(lane)))
        return mixed ^ np.uint64(self.epoch_key(epoch))

    def _samples_at(self, epoch: int, places: Ints) -> Ints:
        if self._in_stored_order:
            return places
        slots, ends = self._line(epoch)
        found = np.searchsorted(ends, places, side="right")
        samples: Ints = places - ends[found] + self.starts[slots[found] + 1]
        return samples

    def _shard_permutation(self, epoch: int) -> KeyedPermutation:
        return KeyedPermutation(len(self.rows), mix_int(self.epoch_key(epoch) + _SHARDS))

    def _laid_out(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the shards in the epoch's order and their ends on the line: two numbers per shard."""
        slots = self._shard_permutation(epoch).forward(np.arange(len(self.rows)))
        return slots, np.cumsum(self.rows[slots])

"""Order in which the samples of a microbatch are of similar length, so that padding is small.

Positions are cut into windows of some global batches. The samples of a window are those of the order without it, and so
a pure function of its number; sorted by length they fill its microbatches, which are shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.trainer.data.ordering.order import Ids, OrderSource, SampleOrder
from everstep.trainer.data.ordering.permutation import GOLDEN, KeyedPermutation, mix_int

_LENGTH_STREAM = 0x6C656E677468


def order_of(run: RunConfig, sources: Sequence[OrderSource]) -> SampleOrder:
    """Return the order of a run."""
    kind = SampleOrder if run.order.length_column is None else LengthOrder
    order = kind.of_config(run.order, sources, run.global_batch, run.micro_batch, run.seed)
    if isinstance(order, LengthOrder):
        order.sort(run.order.length_window, run.micro_batch)
    return order


class LengthOrder(SampleOrder):
    """A sample order that is sorted by length within windows, once `sort` was called."""

    def sort(self, batches: int, micro_batch: int) -> None:
        """Sort within windows of `batches` global batches, whose microbatches have `micro_batch` samples."""
        found = [source.lengths for source in self.sources]
        if any(lengths is None for lengths in found):
            raise ConfigError("order.length_column: the run's data.json has no lengths; start the run again")
        self._lengths = np.concatenate([lengths for lengths in found if lengths is not None])
        self._weighted = np.array([source.weights is not None for source in self.sources])
        whole, rest = divmod(self.global_batch, micro_batch)
        sizes = [micro_batch] * whole + [rest] * (rest > 0)
        self._sizes = np.array(sizes * batches)
        """Samples of each microbatch of a window."""
        self._window = self.global_batch * batches
        self._found = lru_cache(maxsize=8)(self._sorted)

    def at(self, position: int, offsets: NDArray[np.integer]) -> tuple[Ids, Ids]:
        """Return epochs and sample ids as `SampleOrder.at` does."""
        if position < 0:
            raise ValueError(f"a position is 0 or more, not {position}")
        first, rest = divmod(position, self._window)
        flat = offsets.ravel().astype(np.int64, copy=False)
        windows, inside = np.divmod(flat + np.int64(rest), np.int64(self._window))
        epochs, ids = np.empty_like(flat), np.empty_like(flat)
        for window in np.unique(windows).tolist():
            here = windows == window
            _, its_epochs, its_ids = self._found(first + window)
            epochs[here], ids[here] = its_epochs[inside[here]], its_ids[inside[here]]
        return epochs.reshape(offsets.shape), ids.reshape(offsets.shape)

    def position_of(self, sample: int, epoch: int) -> int:
        """Return the position of a visit as `SampleOrder.position_of` does."""
        window, entry = divmod(super().position_of(sample, epoch), self._window)
        entries, _, _ = self._found(window)
        return window * self._window + int(np.flatnonzero(entries == entry)[0])

    def _sorted(self, window: int) -> tuple[Ids, Ids, Ids]:
        """Return the unsorted order's entries that a window visits in turn, their epochs and samples."""
        epochs, ids = super().at(window * self._window, np.arange(self._window))
        once = ids[~self._weighted[np.searchsorted(self.starts, ids, side="right") - 1]]
        if len(np.unique(once)) < len(once):
            # Sorted, the later visit of a sample could come before the earlier one.
            return np.arange(self._window), epochs, ids
        entries = np.empty(self._window, np.int64)
        key = mix_int(self.seed * GOLDEN + _LENGTH_STREAM) ^ mix_int(window * GOLDEN)
        turns = KeyedPermutation(len(self._sizes), key).forward(np.arange(len(self._sizes)))
        ends = np.cumsum(self._sizes)
        filled = np.concatenate([np.arange(ends[turn] - self._sizes[turn], ends[turn]) for turn in turns])
        entries[filled] = np.argsort(self._lengths[ids], kind="stable")
        return entries, epochs[entries], ids[entries]

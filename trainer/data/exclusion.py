"""Samples that a run must not use any more, from some step on: their places in the order stay empty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.config import ExcludeConfig
from trainer.data.order import Ids

NEVER = np.iinfo(np.int64).max


class Exclusion:
    """Which samples are left out at which step. The order of all others does not change."""

    def __init__(self, excludes: Sequence[ExcludeConfig] = ()) -> None:
        first: dict[int, int] = {}
        for exclude in excludes:
            for sample in exclude.samples:
                first[sample] = min(exclude.from_step, first.get(sample, NEVER))
        self._ids = np.array(sorted(first), dtype=np.int64)
        self._first = np.array([first[sample] for sample in sorted(first)], dtype=np.int64)

    def kept(self, ids: Ids, step: int) -> NDArray[np.bool_] | None:
        """Which of the ids step `step` (from 0) uses; None for all of them."""
        if not self._ids.size:
            return None
        found = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        gone: NDArray[np.bool_] = (self._ids[found] == ids) & (self._first[found] <= step)
        return ~gone if gone.any() else None

    def before(self, step: int) -> list[tuple[int, int]]:
        """(sample, from_step) of all that were left out before `step`, sorted."""
        at = zip(self._ids.tolist(), self._first.tolist(), strict=True)
        return [(sample, first) for sample, first in at if first < step]

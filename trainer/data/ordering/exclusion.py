"""Exclusion of samples from some step on: their slots in the order stay empty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from everstep.config import ExcludeConfig, first_steps_without
from everstep.trainer.data.ordering.order import Ids


class Exclusion:
    """Samples that are excluded, with their first step. The order of all others does not change."""

    def __init__(self, excludes: Sequence[ExcludeConfig] = ()) -> None:
        first = first_steps_without(excludes)
        self._ids = np.array(sorted(first), dtype=np.int64)
        self._first = np.array([first[sample] for sample in sorted(first)], dtype=np.int64)

    def __bool__(self) -> bool:
        return bool(self._ids.size)

    def kept(self, ids: Ids, step: int) -> NDArray[np.bool_] | None:
        """Return a mask of the ids that a step uses; None if it uses all."""
        if not self._ids.size:
            return None
        found = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        gone: NDArray[np.bool_] = (self._ids[found] == ids) & (self._first[found] <= step)
        return ~gone if gone.any() else None

"""Exclusion of samples from some step on: their slots in the order stay empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from everstep.config import ExcludeConfig, first_steps_without
from everstep.trainer.data.ordering.order import Ids

EXCLUDED = "excluded"
"""Key of a manifest's values: number and BLAKE3 of the samples that the steps so far left out."""


class Exclusion:
    """Samples that are excluded, with their first step. The order of all others does not change."""

    def __init__(self, excludes: Sequence[ExcludeConfig] = ()) -> None:
        first = first_steps_without(excludes)
        self._ids = np.array(sorted(first), dtype=np.int64)
        self._first = np.array([first[sample] for sample in sorted(first)], dtype=np.int64)

    def __bool__(self) -> bool:
        return bool(self._ids.size)

    def values(self, step: int) -> dict[str, Any]:
        """Return the record for a checkpoint: number and digest of the samples that its steps left out."""
        past = self._first <= step
        if not past.any():
            return {}
        content = np.stack([self._ids[past], self._first[past]]).astype("<i8").tobytes()
        return {EXCLUDED: {"samples": int(past.sum()), "blake3": blake3(content).hexdigest()}}

    def fault(self, values: Mapping[str, Any], step: int) -> str:
        """Return why a run may not go on from a checkpoint with these values; empty if it may."""
        if values.get(EXCLUDED) == self.values(step).get(EXCLUDED):
            return ""
        return "it was trained with samples that `exclude` leaves out of its steps, or without some that it does not"

    def kept(self, ids: Ids, step: int) -> NDArray[np.bool_] | None:
        """Return a mask of the ids that a step uses; None if it uses all."""
        if not self._ids.size:
            return None
        found = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        gone: NDArray[np.bool_] = (self._ids[found] == ids) & (self._first[found] <= step)
        return ~gone if gone.any() else None

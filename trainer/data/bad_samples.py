"""Samples that cannot be used, by their row in the batch, which the caller maps to samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstep.errors import DataError

SHOWN = 3
"""Rows that the message names; `errors` has them all."""


class BadSamples(DataError):
    """Rows of a batch that do not decode, all of them at once: dropping these leaves a good batch.

    It holds rows only; the loader, which has the sample ids, adds dataset and shard or drops the samples.
    """

    def __init__(self, errors: Mapping[int, str]) -> None:
        self.errors = dict(sorted(errors.items()))
        """Row in the batch -> reason, in one line."""
        listed = "; ".join(f"row {row}: {why}" for row, why in list(self.errors.items())[:SHOWN])
        more = f"; and {len(self.errors) - SHOWN} more" if len(self.errors) > SHOWN else ""
        super().__init__(f"{len(self.errors)} of the batch's samples cannot be used: {listed}{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is rebuilt from its message, and would lose the rows when it leaves a worker.
        return (type(self), (self.errors,))

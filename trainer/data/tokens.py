"""Tokens of a sample, where all samples of a dataset have equally many, for a run's length in tokens."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from everstep.trainer.data.dataset import Splits


@runtime_checkable
class PackedTokens(Protocol):
    """A dataset that knows whether all its samples have the same number of tokens."""

    @property
    def tokens_per_sample(self) -> int | None:
        """Tokens of each sample that are predicted; None if samples differ or it is not known."""


def tokens_per_sample(splits: Splits) -> int | None:
    """Return the predicted tokens of each training sample; None if it is not known.

    A function that is applied to the batches may leave tokens out, so nothing is known then.
    """
    if splits.collate is not None or splits.decode is not None or splits.augment is not None:
        return None
    return splits.train.tokens_per_sample if isinstance(splits.train, PackedTokens) else None

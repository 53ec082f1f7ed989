"""Weighted dataset: samples drawn by weight, with replacement."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from everstep.errors import DataError
from everstep.trainer.data.columns import Columns
from everstep.trainer.data.dataset import (
    BatchedReads,
    Dataset,
    MapStyle,
    Prefetchable,
    Sharded,
    ShardedFiles,
    as_dataset,
    location_of,
    mean_sample_bytes,
    take_seeded,
)
from everstep.trainer.data.map_style import Seed
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.data.ordering.permutation import Words
from everstep.trainer.data.randomness import draws


class Weighted:
    """A dataset whose samples are drawn with probabilities proportional to their weights.

    An epoch is as many draws as there are samples. The sample of a draw is a hash of seed, epoch and position, so it is
    the same for every world size and after every restart. A sample that is drawn again is augmented anew.
    """

    def __init__(self, dataset: Dataset | MapStyle, weights: ArrayLike | torch.Tensor) -> None:
        self.dataset = as_dataset(dataset)
        self.weights: NDArray[np.float64] = np.array(weights, dtype=np.float64)
        if self.weights.shape != (len(self.dataset),):
            raise DataError(
                f"data: weights of shape {[*self.weights.shape]} for {len(self.dataset)} samples; give one for each"
            )
        if not np.isfinite(self.weights).all() or self.weights.min(initial=0) < 0 or not self.weights.any():
            raise DataError("data: weights must be finite, 0 or more, and one of them above 0")
        # `isinstance` looks for the attributes of an object, so these abilities are there if the dataset has them.
        if isinstance(self.dataset, BatchedReads):
            self.take_batches = self.dataset.take_batches
        if isinstance(self.dataset, Sharded):
            self.shard_rows = self.dataset.shard_rows
        if isinstance(self.dataset, ShardedFiles):
            self.path, self.shard_files = self.dataset.path, self.dataset.shard_files

    @cached_property
    def digest(self) -> str:
        """Digest of the dataset's digest and the weights."""
        return hashlib.sha256(self.dataset.digest.encode() + b"weights" + self.weights.tobytes()).hexdigest()

    @property
    def draws(self) -> bool:
        return draws(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, ids: Ids) -> Columns:
        return self.dataset.take(ids)

    def take_seeded(self, ids: Ids, keys: Words, seed: Seed) -> Columns:
        return take_seeded(self.dataset, ids, keys, seed)

    @property
    def sample_bytes(self) -> float:
        return mean_sample_bytes(self.dataset)

    @property
    def cache_bytes(self) -> int | None:
        return self.dataset.cache_bytes if isinstance(self.dataset, Prefetchable) else None

    def prefetch(self, ids: Ids) -> Sequence[Future[None]]:
        return self.dataset.prefetch(ids) if isinstance(self.dataset, Prefetchable) else ()

    def location(self, sample: int) -> str:
        return location_of(self.dataset, sample)


def balanced(dataset: Dataset | MapStyle, labels: ArrayLike | torch.Tensor) -> Weighted:
    """Draw every class equally often: each weight is one over the number of samples with the same label."""
    _, inverse, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return Weighted(dataset, 1.0 / counts[inverse])

"""Mixture of datasets: ids of the second begin where the first's end; the order sets the shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from everstep.dataset.index import ShardIndex
from everstep.errors import DataError
from everstep.trainer.data.columns import BadSamples, Columns, Ragged, split
from everstep.trainer.data.dataset import (
    BatchedReads,
    Dataset,
    Prefetchable,
    Sharded,
    ShardedFiles,
    WeightedDraws,
    location_of,
    mean_sample_bytes,
    take_seeded,
)
from everstep.trainer.data.map_style import Seed
from everstep.trainer.data.ordering.data_record import DataRecord, packed
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.data.ordering.permutation import Words
from everstep.trainer.data.randomness import draws
from everstep.trainer.data.sample_lengths import sample_lengths


class Mixture:
    """Datasets with the same columns, each with its share of the samples that a run uses."""

    def __init__(self, datasets: Sequence[Dataset], shares: Sequence[Fraction]) -> None:
        """Make the mixture; the shares sum to 1, see `everstep.trainer.data.ordering.interleave.shares`."""
        if not datasets or len(datasets) != len(shares):
            raise DataError(f"a mixture of {len(datasets)} datasets has {len(shares)} shares; give one for each")
        self.datasets = list(datasets)
        self.shares = list(shares)
        self._starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        batched = all(isinstance(dataset, BatchedReads) for dataset in datasets)
        self.take_batches = self._take_batches if batched else None
        """None if a dataset lacks it, since reading one by one gains nothing: no `BatchedReads` then."""

    @property
    def digest(self) -> str:
        """Digest of the datasets' digests and shares, in order."""
        content = "/".join(f"{d.digest} {share}" for d, share in zip(self.datasets, self.shares, strict=True))
        return hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sample_bytes(self) -> float:
        """Mean size of a sample, of the dataset with the largest."""
        return max(mean_sample_bytes(dataset) for dataset in self.datasets)

    @property
    def tokens_per_sample(self) -> int | None:
        """Predicted tokens of each sample, if they are equally many in all datasets."""
        found = {getattr(dataset, "tokens_per_sample", None) for dataset in self.datasets}
        return found.pop() if len(found) == 1 else None

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of each dataset that the node cache can hold at once; None if none is downloaded."""
        limits = (dataset.cache_bytes for dataset in self.datasets if isinstance(dataset, Prefetchable))
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def draws(self) -> bool:
        return any(draws(dataset) for dataset in self.datasets)

    def take(self, ids: Ids) -> Columns:
        """Gather the samples of each dataset at once, and return them in the order of `ids`."""
        return self._merged(ids, lambda number, rows, own: self.datasets[number].take(own))

    def take_seeded(self, ids: Ids, keys: Words, seed: Seed) -> Columns:
        return self._merged(ids, lambda number, rows, own: take_seeded(self.datasets[number], own, keys[rows], seed))

    def _merged(self, ids: Ids, take: Callable[[int, Ids, Ids], Columns]) -> Columns:
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        rows: list[Ids] = []
        parts: list[Columns] = []
        errors: dict[int, str] = {}
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            try:
                parts.append(take(number, here, ids[here] - self._starts[number]))
            except BadSamples as bad:
                errors |= {int(here[row]): why for row, why in bad.errors.items()}
            rows.append(here)
        if errors:
            raise BadSamples(errors)
        if len(parts) == 1:
            return parts[0]
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        return {name: _together([part[name] for part in parts], back) for name in self._names(parts)}

    def _take_batches(self, ids: Ids, bounds: Sequence[int]) -> Iterator[Columns]:
        return split(self.take(ids), bounds)

    def prefetch(self, ids: Ids) -> list[Future[None]]:
        """Begin to download the samples of those datasets that can."""
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        found: list[Future[None]] = []
        for number, dataset in enumerate(self.datasets):
            if isinstance(dataset, Prefetchable):
                found += dataset.prefetch(ids[numbers == number] - self._starts[number])
        return found

    def location(self, sample: int) -> str:
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return location_of(self.datasets[number], sample - int(self._starts[number]))

    def _names(self, parts: Sequence[Columns]) -> list[str]:
        names = list(parts[0])
        for part in parts[1:]:
            if set(part) != set(names):
                raise DataError(
                    f"data.mix: the datasets have different columns, {', '.join(sorted(names))} and "
                    f"{', '.join(sorted(part))}; choose common ones with data.columns"
                )
        return names


def _together(parts: list[Tensor | Ragged], back: Tensor) -> Tensor | Ragged:
    """Return the parts end to end, reordered so that row i is from index `back[i]`."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        if len({(part.dtype, part.shape[1:]) for part in tensors}) > 1:
            kinds = " and ".join(sorted({f"{part.dtype} {list(part.shape[1:])}" for part in tensors}))
            raise DataError(f"data.mix: the datasets store a column as {kinds}; prepare them alike, or use data.cast")
        return torch.cat(tensors)[back]
    ragged = [part if isinstance(part, Ragged) else Ragged.of(list(part)) for part in parts]
    values = [part[row] for part in ragged for row in range(len(part))]
    return Ragged.of([values[row] for row in back.tolist()])


def records_of(dataset: Dataset, length_column: str | None = None) -> list[DataRecord]:
    """Return a record of each source of a dataset, for the order and the run folder.

    Args:
        length_column: column whose lengths are recorded; None for no lengths.
    """
    if isinstance(dataset, Mixture):
        parts = zip(dataset.datasets, dataset.shares, strict=True)
        return [_record(part, share, length_column) for part, share in parts]
    return [_record(dataset, Fraction(1), length_column)]


def sources_of(dataset: Dataset) -> Iterator[Dataset]:
    """Yield the datasets that a mixture, a subset or weighted draws are made of."""
    if isinstance(dataset, Mixture):
        for part in dataset.datasets:
            yield from sources_of(part)
    elif isinstance(inner := getattr(dataset, "dataset", None), Dataset):
        yield from sources_of(inner)
    else:
        yield dataset


def place_of(dataset: Dataset) -> str:
    """Return path or URL of a dataset, or its class."""
    return dataset.path if isinstance(dataset, ShardedFiles) else type(dataset).__name__


def tags_of(dataset: Dataset) -> dict[str, str]:
    """Return the tags of a source; none if it is no prepared dataset."""
    index = getattr(dataset, "index", None)
    return index.tags if isinstance(index, ShardIndex) else {}


def _record(dataset: Dataset, share: Fraction, length_column: str | None) -> DataRecord:
    rows = dataset.shard_rows if isinstance(dataset, Sharded) else [len(dataset)]
    files = dataset.shard_files if isinstance(dataset, ShardedFiles) else ()
    weights = packed(dataset.weights) if isinstance(dataset, WeightedDraws) else None
    lengths = None if length_column is None else packed(sample_lengths(dataset, length_column))
    tags = tags_of(next(sources_of(dataset)))
    return DataRecord(place_of(dataset), dataset.digest, str(share), rows, files, weights, tags, lengths)

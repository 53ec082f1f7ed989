"""Interface of a dataset: a digest, a length, samples by id, and abilities that it may have besides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.errors import DataError
from everstep.trainer.data.columns import Columns, pieces
from everstep.trainer.data.map_style import MapDataset as MapDataset
from everstep.trainer.data.map_style import Seed
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.data.ordering.permutation import Words
from everstep.trainer.data.randomness import batch_key, draws, draws_nothing

TEST = "test"
"""Name of the test set, used as prefix of its metrics."""
Decode = Callable[[Columns], Columns]
"""Turns stored bytes into tensors; samples that do not decode are reported by `BadSamples`."""
Collate = Callable[[Columns], dict[str, Tensor]]
"""Makes tensors of columns whose samples differ in length: see trainer/data/collate.py."""
Augment = Callable[[dict[str, Tensor], Words], dict[str, Tensor]]
"""(batch, one uint64 key per sample) -> batch.

Draws come from the keys, or from global generators, which are seeded by the microbatch. A function that uses the keys
alone may be marked with `draws_nothing`.
"""


@runtime_checkable
class Dataset(Protocol):
    """Samples with ids 0 to len - 1.

    The protocols below are abilities that a dataset may have besides; `draws` is False if `take` draws no random
    numbers (see `draws_nothing`).
    """

    @property
    def digest(self) -> str:
        """Hex digest of the content: two datasets that differ in one bit have different digests."""

    def __len__(self) -> int: ...

    def take(self, ids: Ids) -> Columns:
        """Return the columns of these samples on the CPU; row i of each is sample `ids[i]`.

        Raises:
            BadSamples: samples cannot be used; it names their rows.
        """


@runtime_checkable
class Seeded(Protocol):
    """A dataset that seeds the generators of each sample itself, because it reads samples one by one."""

    def take_seeded(self, ids: Ids, keys: Words, seed: Seed) -> Columns:
        """Return the samples; call `seed` with the key of each before it is read."""


@runtime_checkable
class BatchedReads(Protocol):
    """A dataset that reads many small batches at once for less than as many calls of `take`."""

    def take_batches(self, ids: Ids, bounds: Sequence[int]) -> Iterator[Columns]:
        """Yield the samples between each two bounds; the call itself raises a fault that is known at once."""


@runtime_checkable
class Prefetchable(Protocol):
    """A dataset that downloads samples ahead of need."""

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the dataset that the node cache can hold at once; None if nothing must be downloaded."""

    def prefetch(self, ids: Ids) -> Sequence[Future[None]]:
        """Begin to download the parts that these samples need, without waiting; empty if none is missing."""


@runtime_checkable
class MeasuredSamples(Protocol):
    """A dataset that knows the size of its samples."""

    @property
    def sample_bytes(self) -> float:
        """Mean size of a stored sample."""


@runtime_checkable
class Located(Protocol):
    """A dataset that knows the origin of each sample."""

    def location(self, sample: int) -> str:
        """Return the location of a sample as text."""


@runtime_checkable
class Sharded(Protocol):
    """A dataset in shards, whose samples the order keeps together."""

    @property
    def shard_rows(self) -> Sequence[int]:
        """Samples of each shard."""


@runtime_checkable
class ShardedFiles(Sharded, Protocol):
    """A dataset whose shards are files."""

    path: str
    """Folder or URL of the files."""

    @property
    def shard_files(self) -> Sequence[str]:
        """Name of each shard."""


@runtime_checkable
class WeightedDraws(Protocol):
    """A dataset whose samples are drawn by weight, with replacement."""

    weights: NDArray[np.float64]
    """Weight of each sample."""


class MapStyle(Protocol):
    """A map-style dataset of torch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass
class Splits:
    """The datasets that a `data` node of the config builds.

    Torch map-style datasets are wrapped in `MapDataset`.
    """

    train: Dataset
    validation: Dataset | Mapping[str, Dataset] | None = None
    """Held-out samples.

    With several named sets each metric is `NAME/metric`, beside that of all sets together.
    """
    augment: Augment | None = None
    """Applied to batches of `train` only."""
    decode: Decode | None = None
    collate: Collate | None = None
    test: Dataset | None = None
    """Evaluated once, when training is done, as `test/metric`."""
    collate_fn: Callable[[list[Any]], Any] | None = None
    """As in torch's DataLoader: makes tensors of a list of samples, if a split is a map-style dataset."""
    columns: Sequence[str] | None = None
    """Names of the items of samples that are tuples, if a split is a map-style dataset."""

    def __post_init__(self) -> None:
        wrap = partial(as_dataset, columns=self.columns, collate_fn=self.collate_fn)
        self.train = wrap(self.train)
        if isinstance(self.validation, Mapping):
            self.validation = {_set_name(name): wrap(found) for name, found in self.validation.items()}
        elif self.validation is not None:
            self.validation = wrap(self.validation)
        if self.test is not None:
            self.test = wrap(self.test)

    def all(self) -> list[Dataset]:
        """Return the datasets of all splits."""
        return [self.train, *self.held_out().values(), *([self.test] if self.test is not None else [])]

    def held_out(self) -> dict[str, Dataset]:
        """Return the validation sets by name; the name of a single one is empty."""
        if self.validation is None:
            return {}
        return dict(self.validation) if isinstance(self.validation, Mapping) else {"": self.validation}


def as_dataset(
    found: Any, columns: Sequence[str] | None = None, collate_fn: Callable[[list[Any]], Any] | None = None
) -> Dataset:
    """Return a dataset as it is, or a torch map-style dataset wrapped.

    Raises:
        DataError: the object has no samples by number.
    """
    return found if isinstance(found, Dataset) else MapDataset(found, columns, collate_fn)


def take_seeded(dataset: Dataset, ids: Ids, keys: Words, seed: Seed) -> Columns:
    """Take samples with all generators seeded by the key of each, or by all keys if taken at once."""
    if isinstance(dataset, Seeded):
        return dataset.take_seeded(ids, keys, seed)
    if draws(dataset):
        seed(batch_key(keys))
    return dataset.take(ids)


def _set_name(name: object) -> str:
    if not isinstance(name, str) or not name or "/" in name or name == TEST:
        raise DataError(f"data: a validation set is called {name!r}; give it a name without '/', other than {TEST!r}")
    return name


@draws_nothing
class ArrayDataset:
    """Columns in memory (or in a memory map): a mapping from name to array of equal lengths."""

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        if not columns:
            raise DataError("the dataset has no columns; pass at least one name with its array")
        self.columns = {name: np.asarray(array) for name, array in columns.items()}
        first = next(iter(self.columns))
        for name, array in self.columns.items():
            if array.dtype.kind not in "biufc":
                raise DataError(f"column {name!r} is of type {array.dtype}; encode it as numbers first")
            if array.ndim == 0 or len(array) != len(self):
                raise DataError(
                    f"column {name!r} is of shape {array.shape} where {first!r} has {len(self)} samples; "
                    "every column needs one row a sample"
                )

    @cached_property
    def digest(self) -> str:
        """Digest of names, types, shapes and bytes; computed once, at the first use."""
        content = hashlib.sha256()
        for name, array in sorted(self.columns.items()):
            content.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return content.hexdigest()

    def __len__(self) -> int:
        first = next(iter(self.columns.values()))
        return len(first) if first.ndim else 0

    @property
    def sample_bytes(self) -> float:
        return sum(array.nbytes for array in self.columns.values()) / max(1, len(self))

    def take(self, ids: Ids) -> Columns:
        """Gather samples, one gather per column, in the column's own type."""
        return {name: torch.from_numpy(array[ids]) for name, array in self.columns.items()}

    def take_batches(self, ids: Ids, bounds: Sequence[int]) -> Iterator[Columns]:
        return pieces(lambda start, stop: self.take(ids[start:stop]), bounds, self.sample_bytes)


class Subset:
    """Some samples of another dataset, in the order of `ids`."""

    def __init__(self, dataset: Dataset | MapStyle, ids: Sequence[int] | Ids) -> None:
        self.dataset = as_dataset(dataset)
        self.ids = np.asarray(ids, dtype=np.int64)
        if self.ids.size and not 0 <= self.ids.min() <= self.ids.max() < len(self.dataset):
            raise DataError(f"a subset of {len(self.dataset)} samples has ids 0 to {len(self.dataset) - 1} only")

    @cached_property
    def digest(self) -> str:
        """Digest of the whole dataset's digest and the chosen ids."""
        return hashlib.sha256(self.dataset.digest.encode() + self.ids.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def draws(self) -> bool:
        return draws(self.dataset)

    def take(self, ids: Ids) -> Columns:
        """Return rows `self.ids[ids]` of the whole dataset."""
        return self.dataset.take(self.ids[ids])

    def take_seeded(self, ids: Ids, keys: Words, seed: Seed) -> Columns:
        return take_seeded(self.dataset, self.ids[ids], keys, seed)

    def location(self, sample: int) -> str:
        return location_of(self.dataset, int(self.ids[sample]))


def location_of(dataset: Dataset, sample: int) -> str:
    """Return the location of a sample as text."""
    return dataset.location(sample) if isinstance(dataset, Located) else f"sample {sample}"


def mean_sample_bytes(dataset: Dataset) -> float:
    """Return the mean size of a stored sample; 0 if it is not known."""
    return float(dataset.sample_bytes) if isinstance(dataset, MeasuredSamples) else 0.0

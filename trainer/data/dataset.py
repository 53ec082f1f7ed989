"""What a dataset is to the trainer: a digest, a length, and a batched gather of samples by id."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from trainer.data.bad import BadSamples
from trainer.data.columns import Columns, pieces
from trainer.data.order import Ids
from trainer.data.permutation import Words
from trainer.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Decode = Callable[[Columns], Columns]
"""Turns stored bytes into tensors; samples that do not decode are told by `BadSamples`."""
Collate = Callable[[Columns], dict[str, Tensor]]
"""Makes tensors of columns whose samples differ in length: see trainer/data/collate.py."""
Augment = Callable[[dict[str, Tensor], Words], dict[str, Tensor]]
"""(batch, one uint64 key a sample) -> batch; every random draw comes from the keys, nothing from a global
generator, so that a sample is augmented alike on every rank and after every restart."""


class Dataset(Protocol):
    """Samples with ids 0 to len - 1.

    It may have more: `shard_rows`, the samples of each of its shards, for the order to keep together; `takes`, many
    `take`s that cost less than as many calls; `sample_bytes`; `place(id)`, where a sample lies, for people;
    `want(ids)`, which begins to fetch samples ahead of need, and `room_bytes`, how much of them may be at hand.
    """

    @property
    def digest(self) -> str:
        """Hex digest of the content: two datasets that differ in one bit have different ones."""
        ...

    def __len__(self) -> int: ...

    def take(self, ids: Ids) -> Columns:
        """The named columns of these samples; row i of each is sample `ids[i]`. On the CPU; `BadSamples` names rows."""
        ...


Takes = Callable[[Ids, Sequence[int]], Iterator[Columns]]
"""(ids, bounds) -> the samples between each two bounds. A fault that it knows of is raised by the call itself."""


@dataclass
class Splits:
    """What a `data` node of the config builds."""

    train: Dataset
    validation: Dataset | None = None
    augment: Augment | None = None
    """Applied to batches of `train` only."""
    decode: Decode | None = None
    collate: Collate | None = None


class ArrayDataset:
    """Columns that lie in memory (or in a memory map): a mapping from name to array of equal lengths."""

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
        """Of names, types, shapes and bytes; read once, at the first use."""
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
        """One gather a column, of the column's own type."""
        return {name: torch.from_numpy(array[ids]) for name, array in self.columns.items()}

    def takes(self, ids: Ids, bounds: Sequence[int]) -> Iterator[Columns]:
        return pieces(lambda start, stop: self.take(ids[start:stop]), bounds, self.sample_bytes)


def frame_dataset(frame: pd.DataFrame, features: Sequence[str], target: str) -> ArrayDataset:
    """A pandas table as columns `features` (float32 [n, len(features)]) and `target`.

    A target of whole numbers, booleans or categories becomes int64 classes, one of floats stays float32.
    """
    for name in [*features, target]:
        if name not in frame.columns:
            raise DataError(f"the table has no column {name!r}; it has {', '.join(map(str, frame.columns))}")
    try:
        table = frame[list(features)].to_numpy(dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"a feature is not a number ({error}); encode it or leave it out") from error
    holes = [name for name, bad in zip(features, ~np.isfinite(table).all(axis=0), strict=True) if bad]
    if holes:
        raise DataError(f"columns with missing or infinite values: {', '.join(holes)}; fill or drop the rows")
    return ArrayDataset({"features": table, "target": _target(frame[target])})


def _target(column: pd.Series[Any]) -> NDArray[Any]:
    if column.isna().any():
        raise DataError(f"target {column.name!r} has missing values; drop those rows")
    if str(column.dtype) == "category":
        return column.cat.codes.to_numpy(dtype=np.int64)
    if column.dtype.kind in "biu":
        return column.to_numpy(dtype=np.int64)
    if column.dtype.kind == "f":
        return column.to_numpy(dtype=np.float32)
    raise DataError(f"target {column.name!r} is of type {column.dtype}; make it categories or numbers")


class MapDataset:
    """A torch map-style dataset (`__len__`, `__getitem__`), collated by torch's default_collate.

    `columns` names the items where the dataset returns tuples. The digest is the object's own `digest`
    attribute where it has one; otherwise only its class and length, which tell no change of content.
    """

    def __init__(self, source: Any, columns: Sequence[str] | None = None) -> None:
        for method in ("__len__", "__getitem__"):
            if not hasattr(source, method):
                raise DataError(f"{type(source).__name__} has no {method}; a map-style dataset needs it")
        self.source = source
        self._columns = columns

    @property
    def digest(self) -> str:
        """The source's own `digest`, else a hash of its class name and length."""
        own = getattr(self.source, "digest", None)
        if own is not None:
            return str(own)
        kind = type(self.source)
        return hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}\0{len(self)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def take(self, ids: Ids) -> Columns:
        """Sample by sample, because that is all a map-style dataset offers; `workers` spread the cost."""
        batch = default_collate(self._samples(ids))
        if isinstance(batch, Mapping):
            return dict(batch)
        items = [batch] if isinstance(batch, Tensor) else list(batch)
        if self._columns is None or len(self._columns) != len(items):
            raise DataError(
                f"{type(self.source).__name__} returns {len(items)} unnamed items a sample; "
                f"pass columns=[…] with {len(items)} names, or return dicts"
            )
        return dict(zip(self._columns, items, strict=True))

    def _samples(self, ids: Ids) -> list[Any]:
        samples, errors = [], {}
        for row, index in enumerate(ids.tolist()):
            try:
                samples.append(self.source[index])
            except Exception as error:
                cause, errors[row] = error, f"{type(error).__name__}: {error}"
        if errors:
            raise BadSamples(errors) from cause
        return samples


class Subset:
    """Some samples of another dataset, in the order of `ids`."""

    def __init__(self, dataset: Dataset, ids: Sequence[int] | Ids) -> None:
        self.dataset = dataset
        self.ids = np.asarray(ids, dtype=np.int64)
        if self.ids.size and not 0 <= self.ids.min() <= self.ids.max() < len(dataset):
            raise DataError(f"a subset of {len(dataset)} samples has ids 0 to {len(dataset) - 1} only")

    @cached_property
    def digest(self) -> str:
        """Of the whole dataset's digest and the chosen ids."""
        return hashlib.sha256(self.dataset.digest.encode() + self.ids.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, ids: Ids) -> Columns:
        """Rows `self.ids[ids]` of the whole dataset."""
        return self.dataset.take(self.ids[ids])

    def place(self, sample: int) -> str:
        return place_of(self.dataset, int(self.ids[sample]))


def place_of(dataset: Dataset, sample: int) -> str:
    """Where a sample lies, for people."""
    place: Callable[[int], str] | None = getattr(dataset, "place", None)
    return place(sample) if place is not None else f"sample {sample}"

"""Adapter for torch's map-style datasets: samples are read one by one, each with its own seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from everstep.errors import ConfigError, DataError
from everstep.fault import fault_of
from everstep.outcome import Fault
from everstep.trainer.data.columns import BadSamples, Columns, Ragged
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.data.ordering.permutation import Words
from everstep.trainer.data.randomness import batch_key

Seed = Callable[[int], None]
"""Seeds every generator that the dataset may draw from."""
COLLATE_STREAM = 0x636F6C6C617465


class MapDataset:
    """A torch map-style dataset (`__len__`, `__getitem__`); generators are seeded before each sample.

    The digest is the object's own `digest` attribute if it has one; otherwise it covers only class and length, so that
    a change of content is not detected.
    """

    def __init__(
        self,
        source: Any,
        columns: Sequence[str] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """Wrap `source`.

        Args:
            columns: names of the items if the dataset, or `collate_fn`, returns tuples.
            collate_fn: makes tensors of a list of samples, as in torch's DataLoader. Without it samples of one shape
            are
                stacked, and one-dimensional ones of different lengths are a ragged column for `Splits.collate`.
        """
        _check_map_style(source)
        self.source = source
        self.collate_fn = collate_fn
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
        """Return the samples, read one by one as in any map-style dataset; `workers` share the cost."""
        return self.take_seeded(ids, np.zeros(len(ids), np.uint64), lambda key: None)

    def take_seeded(self, ids: Ids, keys: Words, seed: Seed) -> Columns:
        """Return the samples; call `seed` with each one's key, and before the collate with a key of all.

        Raises:
            BadSamples: some samples cannot be read, for a reason other than a fault of the machine.
        """
        samples, errors = [], {}
        for row, (index, key) in enumerate(zip(ids.tolist(), keys.tolist(), strict=True)):
            seed(key)
            try:
                samples.append(self.source[index])
            except Exception as error:
                # Not the sample's fault: skipping it would make this run differ from one on a working machine.
                if isinstance(error, ConfigError) or fault_of(error) is Fault.machine:
                    raise
                cause, errors[row] = error, " ".join(f"{type(error).__name__}: {error}".split())
        if errors:
            raise BadSamples(errors) from cause
        seed(batch_key(keys) ^ COLLATE_STREAM)
        return self._collated(samples)

    def _collated(self, samples: list[Any]) -> Columns:
        if self.collate_fn is not None:
            batch = self.collate_fn(samples)
            return dict(batch) if isinstance(batch, Mapping) else self._named(_items(batch))
        first = samples[0]
        if isinstance(first, Mapping):
            return {name: _column(str(name), [_value(sample, name) for sample in samples]) for name in first}
        names = list(self._named(_items(first)))
        return {name: _column(name, [_items(s)[number] for s in samples]) for number, name in enumerate(names)}

    def _named(self, items: Sequence[Any]) -> dict[str, Any]:
        if self._columns is None or len(self._columns) != len(items):
            raise DataError(
                f"{type(self.source).__name__} returns {len(items)} unnamed items a sample; "
                f"pass columns=[…] with {len(items)} names, or return dicts"
            )
        return dict(zip(self._columns, items, strict=True))


def _check_map_style(source: Any) -> None:
    kind = type(source).__name__
    has_items = hasattr(source, "__getitem__") and not isinstance(source, IterableDataset)
    if not has_items and hasattr(source, "__iter__"):
        raise DataError(
            f"data: {kind} can only be iterated, so a run could not resume in it: use a map-style dataset (__len__, "
            "__getitem__), or make shards of it with `everstep data prepare format=generator`"
        )
    for method in ("__len__", "__getitem__"):
        if not hasattr(source, method):
            raise DataError(f"data: {kind} has no {method}; a map-style dataset needs it")


def _items(sample: Any) -> list[Any]:
    return list(sample) if isinstance(sample, list | tuple) else [sample]


def _value(sample: Any, name: Any) -> Any:
    try:
        return sample[name]
    except (KeyError, TypeError, IndexError):
        raise DataError(
            f"data: a sample has no {name!r}, which the first of its batch has; return the same for each"
        ) from None


def _column(name: str, values: list[Any]) -> Any:
    """Return a column: values of one shape stacked, vectors of different lengths ragged, text as a list."""
    if isinstance(values[0], Tensor | np.ndarray):
        tensors = [torch.as_tensor(value) for value in values]
        if len({tensor.shape for tensor in tensors}) > 1:
            if all(tensor.ndim == 1 for tensor in tensors):
                return Ragged.of(tensors)
            shapes = " and ".join(sorted({str([*tensor.shape]) for tensor in tensors})[:2])
            raise DataError(
                f"data: samples of column {name!r} are of shapes {shapes}; give a collate_fn that pads them"
            )
    try:
        return default_collate(values)
    except (TypeError, RuntimeError) as error:
        kind = type(values[0]).__name__
        raise DataError(
            f"data: column {name!r} holds a {kind}, of which no batch can be made "
            f"({' '.join(str(error).split())[:120]}); make it a tensor in __getitem__, or give a collate_fn"
        ) from error

"""Slices of a set by the values of one of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from everstep.errors import ConfigError
from everstep.trainer.data.columns import Ragged
from everstep.trainer.data.dataset import Dataset, Subset
from everstep.trainer.data.fetcher import Fetcher

MOST_SLICES = 100
MOST_NUMBERS = 20
"""Different values of a column of fractions above which it is cut at its quartiles."""
CHUNK = 4096


def slices(data: Fetcher, column: str) -> dict[str, Fetcher]:
    """Return a fetcher for the samples of each value of a column; fractions are cut at their quartiles.

    Raises:
        ConfigError: there is no such column, it is no single value per sample, or it has too many values.
    """
    labels = _labels(data.dataset, column)
    found, places = np.unique(labels, return_inverse=True)
    if len(found) > MOST_SLICES:
        raise ConfigError(
            f"--by {column}: it has {len(found)} different values (limit {MOST_SLICES}); choose a column of few values"
        )
    order = sorted(range(len(found)), key=lambda at: _sort_key(str(found[at])))
    return {
        str(found[at]): replace(data, dataset=Subset(data.dataset, np.flatnonzero(places == at).astype(np.int64)))
        for at in order
    }


def _labels(dataset: Dataset, column: str) -> NDArray[np.str_]:
    """Return the value of the column as text, for each sample."""
    parts = [
        _values(dataset, np.arange(at, min(at + CHUNK, len(dataset))), column) for at in range(0, len(dataset), CHUNK)
    ]
    if isinstance(parts[0], list):
        return np.array([text for part in parts for text in part])
    values = np.concatenate([np.asarray(part) for part in parts])
    if values.dtype.kind == "f" and len(np.unique(values)) > MOST_NUMBERS:
        return _quartiles(values)
    return np.array([str(value) for value in values.tolist()])


def _values(dataset: Dataset, ids: NDArray[np.int64], column: str) -> Sequence[str] | NDArray[np.generic]:
    columns = dataset.take(ids)
    if column not in columns:
        raise ConfigError(f"--by {column}: the data has no such column; there are {', '.join(sorted(columns))}")
    values = columns[column]
    if isinstance(values, Ragged):
        if values.values.dtype is not torch.uint8:
            raise ConfigError(f"--by {column}: it is a list of numbers for each sample; choose a column of one value")
        return [values.bytes(row).decode("utf-8", errors="replace") for row in range(len(values))]
    if values.dim() != 1:
        shape = list(values.shape[1:])
        raise ConfigError(f"--by {column}: it has shape {shape} for each sample; choose a column of one value")
    return np.asarray(values.numpy())


def _quartiles(values: NDArray[np.generic]) -> NDArray[np.str_]:
    numbers = values.astype(np.float64)
    edges = np.unique(np.nanpercentile(numbers, [0, 25, 50, 75, 100]))
    names = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]
    at = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(names) - 1)
    return np.where(np.isnan(numbers), "nan", np.array(names)[at])


def _sort_key(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label.split(" to ")[0]), label
    except ValueError:
        return 1, 0.0, label

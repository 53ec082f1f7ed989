"""Slices of a set by the values of one of its columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.errors import ConfigError
from everstep.trainer.data.columns import Columns, Ragged
from everstep.trainer.data.dataset import Dataset, take_seeded
from everstep.trainer.data.fetcher import Fetcher, MicrobatchRequest
from everstep.trainer.data.map_style import Seed
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.data.ordering.permutation import Words
from everstep.trainer.data.randomness import draws

MOST_SLICES = 100
MOST_NUMBERS = 20
"""Different values of a column of fractions above which it is cut at its quartiles."""
LONGEST_TEXT = 200
"""Bytes of a text that are compared."""
CHUNK = 512


class _OneColumn:
    """A dataset's column alone; text as rows of bytes, with its length in front."""

    def __init__(self, dataset: Dataset, column: str) -> None:
        self.dataset, self.column = dataset, column
        self.digest = dataset.digest

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def draws(self) -> bool:
        return draws(self.dataset)

    def take(self, ids: Ids) -> Columns:
        return {self.column: _values(self.dataset.take(ids), self.column)}

    def take_seeded(self, ids: Ids, keys: Words, seed: Seed) -> Columns:
        return {self.column: _values(take_seeded(self.dataset, ids, keys, seed), self.column)}


def slices(data: Fetcher, column: str) -> dict[str, Ids]:
    """Return the samples of each value of a column; fractions are cut at their quartiles.

    Samples that cannot be decoded belong to no slice.

    Raises:
        ConfigError: there is no such column, it is no single value per sample, or it has too many values.
    """
    ids, labels = _labels(data, column)
    found, places = np.unique(labels, return_inverse=True)
    if len(found) > MOST_SLICES:
        raise ConfigError(
            f"--by {column}: it has {len(found)} different values (limit {MOST_SLICES}); choose a column of few values"
        )
    order = sorted(range(len(found)), key=lambda at: _sort_key(str(found[at])))
    return {str(found[at]): ids[places == at] for at in order}


def _labels(data: Fetcher, column: str) -> tuple[Ids, NDArray[np.str_]]:
    """Return the samples, and the value of the column for each as text."""
    alone = replace(data, dataset=_OneColumn(data.dataset, column), decode=None, collate=None, augment=None)
    every = np.arange(len(data.dataset))
    parts = [every[at : at + CHUNK] for at in range(0, len(every), CHUNK)]
    batches = list(alone.each([MicrobatchRequest(part, np.zeros_like(part), 0) for part in parts]))
    ids = np.concatenate([batch.ids[: len(batch.ids) if batch.real else 0] for batch in batches])
    values = torch.cat([batch.batch[column][: len(batch.ids) if batch.real else 0] for batch in batches])
    if values.dim() == 2:
        return ids, np.array([bytes(row[2 : 2 + _length(row)]).decode(errors="replace") for row in values.numpy()])
    numbers = values.numpy()
    if numbers.dtype.kind == "f" and len(np.unique(numbers)) > MOST_NUMBERS:
        return ids, _quartiles(numbers)
    return ids, np.array([str(value) for value in numbers.tolist()])


def _values(columns: Columns, column: str) -> Tensor:
    """Return a number for each sample [n], or a text as bytes [n, 2 + LONGEST_TEXT], the length first."""
    if column not in columns:
        raise ConfigError(f"--by {column}: the data has no such column; there are {', '.join(sorted(columns))}")
    values = columns[column]
    if not isinstance(values, Ragged):
        if values.dim() != 1:
            shape = list(values.shape[1:])
            raise ConfigError(f"--by {column}: it has shape {shape} for each sample; choose a column of one value")
        return values
    if values.values.dtype is not torch.uint8:
        raise ConfigError(f"--by {column}: it is a list of numbers for each sample; choose a column of one value")
    rows = torch.zeros(len(values), 2 + LONGEST_TEXT, dtype=torch.uint8)
    for row in range(len(values)):
        text = values[row][:LONGEST_TEXT]
        rows[row, 0], rows[row, 1] = divmod(len(text), 256)
        rows[row, 2 : 2 + len(text)] = text
    return rows


def _length(row: NDArray[np.uint8]) -> int:
    return int(row[0]) * 256 + int(row[1])


def _quartiles(values: NDArray[np.generic]) -> NDArray[np.str_]:
    numbers = values.astype(np.float64)
    edges = np.unique(np.nanpercentile(numbers, [0, 25, 50, 75, 100]))
    names = _ranges(edges.tolist())
    at = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(names) - 1)
    return np.where(np.isnan(numbers), "nan", np.array(names)[at])


def _ranges(edges: Sequence[float]) -> list[str]:
    """Return a name for each range, with as many digits as tell the edges apart."""
    for digits in range(4, 18):
        shown = [f"{edge:.{digits}g}" for edge in edges]
        if len(set(shown)) == len(edges):
            break
    return [f"{low} to {high}" for low, high in pairwise(shown)]


def _sort_key(label: str) -> tuple[int, float, str]:
    try:
        number = float(label.split(" to ")[0])
        return (1, 0.0, label) if math.isnan(number) else (0, number, label)
    except ValueError:
        return 1, 0.0, label

"""Data in memory as a dataset: arrays, frames, sparse matrices, torch and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare_arrays, prepare_frame, prepare_rows
from everstep.errors import ConfigError

FEATURES, TARGET = "features", "target"
MOST_DENSE_BYTES = 4 << 30
"""Bytes of a sparse matrix as a dense one, up to which it is written as such."""
PROBED = 3
"""Samples of a dataset that are read twice, to see whether it draws random numbers."""


def write_data(data: Any, folder: str, target: str | None, validation: float) -> Mapping[str, ShardIndex]:
    """Write a dataset of Arrow shards; return the index of each split.

    Args:
        target: column of a frame that is the target; the others become `features`. None keeps all columns.
        validation: fraction of the samples to hold out.

    Raises:
        ConfigError: data of this kind cannot be written.
    """
    options: dict[str, Any] = {"validation": validation} if validation else {}
    kind = type(data).__module__.partition(".")[0]
    if target is not None:
        data = _split_off(data, target)
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_dataset(data):
        data = {FEATURES: data[0], TARGET: data[1]}
    if isinstance(data, Mapping):
        return prepare_arrays(
            {str(name): array_of(value, str(name)) for name, value in data.items()}, folder, **options
        )
    if kind in ("pandas", "polars", "pyarrow"):
        return prepare_frame(data, folder, **options)
    if _is_dataset(data):
        _refuse_draws(data)
        return prepare_rows(lambda: _rows(data), folder, **options)
    raise ConfigError(
        f"data is a {type(data).__name__}: give a pair (features, target) of arrays, a dict of arrays, a DataFrame, "
        "or a torch or Hugging Face dataset with a length"
    )


def array_of(value: Any, name: str) -> np.ndarray[Any, Any]:
    """Return a column as an array [samples, …]; sparse matrices become dense ones."""
    if hasattr(value, "toarray"):  # of SciPy
        size = int(np.prod(value.shape)) * value.dtype.itemsize
        if size > MOST_DENSE_BYTES:
            raise ConfigError(
                f"data: {name} has {size / 2**30:.1f} GiB as a dense array (limit {MOST_DENSE_BYTES >> 30}); prepare "
                "it as rows of indices and values (docs/data.md), or leave columns out"
            )
        value = value.toarray()
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    found = np.asarray(value)
    if found.ndim == 0 or found.dtype == object:
        raise ConfigError(f"data: {name} is no array of numbers or texts with one row per sample; convert it first")
    return found


def _split_off(frame: Any, target: str) -> dict[str, Any]:
    names = [str(name) for name in getattr(frame, "columns", ())]
    if target not in names:
        raise ConfigError(f"target={target!r}: the data has no such column, but {', '.join(names) or 'no names'}")
    others = {name: np.asarray(frame[name]) for name in names if name != target}
    strange = [name for name, column in others.items() if column.dtype.kind not in "biuf"]
    if strange:
        raise ConfigError(f"data: column {strange[0]!r} is not numeric; encode it, or leave it out")
    if not others:
        raise ConfigError(f"data: the frame has no column besides {target!r}")
    return {FEATURES: np.stack(list(others.values()), axis=1), TARGET: np.asarray(frame[target])}


def _is_dataset(data: object) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, tuple | list | str)


def _row(sample: Any) -> dict[str, Any]:
    if isinstance(sample, tuple | list):
        names = (FEATURES, TARGET) if len(sample) == 2 else tuple(f"item_{n}" for n in range(len(sample)))
        sample = dict(zip(names, sample, strict=True))
    if not isinstance(sample, Mapping):
        raise ConfigError(f"data: a sample is a {type(sample).__name__}; it must be a tuple or a dict of arrays")
    return {str(name): value.numpy() if hasattr(value, "detach") else value for name, value in sample.items()}


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    return (_row(data[number]) for number in range(len(data)))


def _refuse_draws(data: Any) -> None:
    """Raise ConfigError if samples are random: all epochs would get the one draw that is written."""
    for number in range(min(PROBED, len(data))):
        first, second = _row(data[number]), _row(data[number])
        if any(not np.array_equal(np.asarray(first[name]), np.asarray(second[name])) for name in first):
            raise ConfigError(
                f"data: sample {number} differs when it is read again, so the dataset draws random numbers; give the "
                "samples as they are stored, and draw in a module of your own (docs/data.md, augment)"
            )

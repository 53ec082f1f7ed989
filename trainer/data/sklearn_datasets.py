"""Small real datasets that come with scikit-learn: no download, trained in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from everstep.errors import ConfigError, DataError
from everstep.trainer.data.dataset import ArrayDataset, Splits
from everstep.trainer.data.ordering.order import Ids, uniform
from everstep.trainer.data.ordering.permutation import KeyedPermutation, Words
from everstep.trainer.data.randomness import draws_nothing

if TYPE_CHECKING:
    import pandas as pd


def digits(held_out: float = 0.2, split_seed: int = 0) -> Splits:
    """Return 1,797 handwritten digits: `image` float32 [n, 1, 8, 8] in [0, 1], `label` int64 [n].

    Each sample is shifted by up to one pixel, anew in each epoch. `baseline` int64 [n] is `most_common`.
    """
    images, labels = _datasets().load_digits(return_X_y=True)
    columns = {
        "image": (images / 16).astype(np.float32).reshape(-1, 1, 8, 8),
        "label": labels.astype(np.int64),
    }
    parts = split_ids(len(labels), held_out, split_seed)
    columns["baseline"] = most_common(labels, parts[0])
    train, validation = (ArrayDataset({name: array[ids] for name, array in columns.items()}) for ids in parts)
    return Splits(train, validation, shifted)


def breast_cancer(held_out: float = 0.25, split_seed: int = 0) -> Splits:
    """Return 569 cell samples: `features` float32 [n, 30], standardised, `target` int64.

    The target is 0 for malignant, 1 for benign. `baseline` int64 [n] is `most_common`.
    """
    frame: pd.DataFrame = _datasets().load_breast_cancer(as_frame=True).frame
    features = [name for name in frame.columns if name != "target"]
    train_ids, validation_ids = split_ids(len(frame), held_out, split_seed)
    # Held-out samples must not leak into the statistics.
    mean, spread = frame[features].iloc[train_ids].mean(), frame[features].iloc[train_ids].std()
    frame[features] = (frame[features] - mean) / spread
    baseline = most_common(frame["target"].to_numpy(), train_ids)
    train, validation = (
        ArrayDataset({**frame_dataset(frame.iloc[ids], features, "target").columns, "baseline": baseline[ids]})
        for ids in (train_ids, validation_ids)
    )
    return Splits(train, validation)


def most_common(labels: NDArray[Any], train: Ids) -> NDArray[np.int64]:
    """Return the most common label of the training samples, once for each sample: the trivial baseline."""
    values, counts = np.unique(labels[train], return_counts=True)
    return np.full(len(labels), values[counts.argmax()], np.int64)


def split_ids(samples: int, held_out: float, seed: int) -> tuple[Ids, Ids]:
    """Return ids to train on and ids held out, in a shuffled order set by `seed` alone."""
    count = round(samples * held_out)
    if not 0 < count < samples:
        raise ConfigError(f"data.held_out={held_out} leaves {count} of {samples} samples held out; choose 0.1 to 0.5")
    order = KeyedPermutation(samples, seed).forward(np.arange(samples))
    return np.sort(order[count:]), np.sort(order[:count])


def frame_dataset(frame: pd.DataFrame, features: Sequence[str], target: str) -> ArrayDataset:
    """Return a pandas table as columns `features` (float32 [n, len(features)]) and `target`.

    A target of whole numbers, booleans or categories becomes int64 classes; one of floats becomes float32.
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


@draws_nothing
def shifted(batch: dict[str, Tensor], keys: Words) -> dict[str, Tensor]:
    """Move each `image` [n, c, h, w] by -1, 0 or 1 pixels in both directions, filled with zeros."""
    image = batch["image"]
    down, right = (torch.from_numpy((uniform(keys, stream) * 3).astype(np.int64)) for stream in (0, 1))
    height, width = image.shape[2:]
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    samples = torch.arange(len(image))[:, None, None]
    # Indexing around the slice puts the indexed dimensions first: [n, h, w, c].
    moved = F.pad(image, (1, 1, 1, 1))[samples, :, rows[:, :, None], columns[:, None, :]]
    return {**batch, "image": moved.permute(0, 3, 1, 2).contiguous()}


def _datasets() -> ModuleType:
    try:
        import pandas  # noqa: F401
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            f"this dataset needs {error.name}: pip install 'everstep[examples]'",
        ) from error
    module: ModuleType = datasets
    return module

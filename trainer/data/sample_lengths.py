"""Lengths of the samples of a dataset, by one of its columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from everstep.errors import ConfigError
from everstep.trainer.data.columns import Ragged
from everstep.trainer.data.dataset import Dataset, Prefetchable

READ = 4096
"""Samples that are read at a time."""


def sample_lengths(dataset: Dataset, column: str) -> NDArray[np.float64]:
    """Return the length of each sample, from one pass over the dataset.

    Raises:
        ConfigError: the dataset is not on this machine, or its samples do not differ in the length of the column.
    """
    if isinstance(dataset, Prefetchable) and dataset.cache_bytes is not None:
        raise ConfigError(
            f"order.length_column={column}: all samples would be downloaded at each start to know their lengths; copy "
            "the dataset to a local disk, uncompressed, or set order.length_column=null"
        )
    found = []
    for start in range(0, len(dataset), READ):
        columns = dataset.take(np.arange(start, min(start + READ, len(dataset))))
        values = columns.get(column)
        if not isinstance(values, Ragged):
            ragged = [name for name, other in columns.items() if isinstance(other, Ragged)]
            raise ConfigError(
                f"order.length_column={column}: the data has no column of that name whose samples differ in length "
                f"({', '.join(ragged) or 'none'}); choose another column, or null"
            )
        found.append(values.lengths.numpy().astype(np.float64))
    return np.concatenate(found)

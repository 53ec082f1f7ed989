"""Values of any type as integers of their size, since neither NumPy nor torch can index all types."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.errors import DataError
from everstep.trainer.data.ragged import Ragged

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def values_of(column: Ragged) -> Tensor:
    """Return the values of all samples; a view may have others before and after them."""
    return column.values[int(column.offsets[0]) : int(column.offsets[-1])]


def counted_from_zero(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 … size - 1 for each of the sizes, end to end."""
    starts = np.cumsum(sizes) - sizes
    counted: NDArray[np.int64] = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    return counted


def bits_of(values: Tensor) -> NDArray[np.integer]:
    """Return the memory of a contiguous CPU tensor as integers."""
    return values.contiguous().view(_BITS[values.element_size()]).numpy()


def bit_pattern(value: float, dtype: torch.dtype, key: str, column: str) -> int:
    """Return the bits of `value` in `dtype` as an integer.

    Raises:
        DataError: the type cannot hold the value.
    """
    try:
        # torch wraps small negative numbers round in unsigned types without an error.
        held = torch.tensor(value, dtype=dtype)
        fits = dtype.is_floating_point or held.item() == value
    except (RuntimeError, OverflowError, TypeError, ValueError):
        fits = False
    if not fits:
        raise DataError(f"data.collate.{key}={value!r} does not fit column {column!r}, which is {dtype}")
    return int(held.view(_BITS[held.element_size()]).item())

"""Rows copied straight from their addresses, so that one gather serves any number of memory-mapped shards.

A gather for each shard that a batch touches costs microseconds a shard; a batch of 32 from 64 shards would cost more
than its bytes. The views below span the whole address space instead, and are indexed by where each row lies. Only
addresses of rows that exist may be passed: nothing here checks them.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_ORIGIN = 1 << 16
"""Below the lowest address that a process may map; a view that began at 0 would be taken for no array."""
_TOP = 1 << 47
"""User space of a 64-bit process ends here on x86-64, and no mapping is placed higher unasked elsewhere."""
_WIDEST = 1 << 15
"""Elements a row; of wider ones, the product of the view's shape would not fit into 64 bits."""


def address_of(array: NDArray[Any]) -> int:
    """Where the array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address


def gather_rows(addresses: Ints, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The rows of `shape` at these addresses: [len(addresses), *shape].

    Every address must be a multiple of the element's size, and all bytes of the row must be mapped.
    """
    width, size = math.prod(shape), np.dtype(dtype).itemsize
    if not 0 < width <= _WIDEST:
        rows = np.empty((len(addresses), *shape), dtype)
        _copy(address_of(rows), addresses.tolist(), [width * size] * len(addresses))
        return rows
    found: NDArray[Any] = _space(dtype, width)[(addresses - _ORIGIN) // size]
    return found.reshape(len(addresses), *shape)


def gather_ragged(addresses: Ints, lengths: Ints, dtype: str) -> tuple[NDArray[Any], Ints]:
    """The `lengths` elements at each address, end to end, and the offsets [len(addresses) + 1] between them."""
    offsets = np.zeros(len(addresses) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = np.empty(offsets[-1], dtype)
    _copy(address_of(values), addresses.tolist(), (lengths * values.itemsize).tolist())
    return values, offsets


def numbers_at(addresses: Ints) -> Ints:
    """The int64 at each address, a multiple of 8."""
    return gather_rows(addresses, "int64", (1,))[:, 0]


def _copy(target: int, sources: list[int], sizes: list[int]) -> None:
    memmove = ctypes.memmove
    for source, size in zip(sources, sizes, strict=True):
        memmove(target, source, size)
        target += size


@lru_cache(maxsize=64)
def _space(dtype: str, width: int) -> NDArray[Any]:
    """Row i is the `width` elements that begin `i` elements after the origin."""
    size = np.dtype(dtype).itemsize
    start = np.frombuffer(memoryview((ctypes.c_char * (width * size)).from_address(_ORIGIN)), dtype)
    rows = (_TOP - _ORIGIN) // size - width
    return np.lib.stride_tricks.as_strided(start, (rows, width), (size, size), writeable=False)

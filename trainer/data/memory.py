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
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

_ORIGIN = 1 << 16
"""Below the lowest address that a process may map; a view that began at 0 would be taken for no array."""
_TOP = 1 << 47
"""User space of a 64-bit process ends here on x86-64, and no mapping is placed higher unasked elsewhere."""
_WIDEST = 1 << 15
"""Bytes a row; of wider ones, the product of a view's items and their size would not fit into 63 bits."""
_AT_A_TIME = 256 << 10
"""Bytes that are gathered before they are put, and cast, in their place: they stay in the core's own cache."""


def address_of(array: NDArray[Any]) -> int:
    """Where the array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address


def element_of(array: NDArray[Any]) -> int:
    """How many elements of its size after the origin the array begins."""
    return (address_of(array) - _ORIGIN) // array.itemsize


def gather_rows(elements: Ints, dtype: str, shape: tuple[int, ...], out: Tensor) -> None:
    """The rows of `shape` that begin at these elements, into `out` [len(elements), *shape] of this or another type.

    Elements are counted as `element_of` does; all bytes of every row must be mapped.
    """
    width, size = math.prod(shape), np.dtype(dtype).itemsize
    if not 0 < width * size <= _WIDEST:
        for element, row in zip(elements.tolist(), out, strict=True):
            copied = np.empty(shape, dtype)
            ctypes.memmove(address_of(copied), _ORIGIN + element * size, width * size)
            row.copy_(torch.from_numpy(copied))
        return
    space, count = _space(width * size, size), max(1, _AT_A_TIME // (width * size))
    rows = out.view(len(elements), width)
    for start in range(0, len(elements), count):
        found = space[elements[start : start + count]].view(dtype).reshape(-1, width)
        rows[start : start + count].copy_(torch.from_numpy(found))


def gather_ragged(elements: Ints, values: Ints, kind: torch.dtype) -> tuple[Tensor, Ints]:
    """Rows of different lengths, end to end, and the offsets [len(elements) + 1] between them.

    Args:
        elements: where the offset of each row stands (`element_of`), followed by that of the next row.
        values: address of the element that offset 0 means.
    """
    size = kind.itemsize
    bounds = _space(16, 8)[elements].view(np.int64).reshape(-1, 2)
    offsets = np.zeros(len(elements) + 1, np.int64)
    np.subtract(bounds[:, 1], bounds[:, 0], out=offsets[1:])
    np.cumsum(offsets, out=offsets)
    memory, places = _memory(), bounds * size + (values - _ORIGIN)[:, None]
    # Of all ways from Python, the one with the least work for each row.
    content = bytearray().join([memory[start:stop] for start, stop in places.tolist()])
    return torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind), offsets


@lru_cache(maxsize=1)
def _memory() -> memoryview:
    """All bytes from the origin on."""
    return memoryview((ctypes.c_char * (_TOP - _ORIGIN)).from_address(_ORIGIN)).cast("B")


@lru_cache(maxsize=64)
def _space(row: int, step: int) -> NDArray[np.void]:
    """Item i is the `row` bytes that begin `i * step` bytes after the origin."""
    start = np.frombuffer(memoryview((ctypes.c_char * row).from_address(_ORIGIN)), f"V{row}")
    return np.lib.stride_tricks.as_strided(start, ((_TOP - _ORIGIN - row) // step,), (step,), writeable=False)

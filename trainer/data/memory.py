"""Rows copied straight from their addresses, so that one gather serves any number of memory-mapped shards.

A gather for each shard that a batch touches costs microseconds a shard; a batch of 32 from 64 shards would cost more
than its bytes. The views below span the whole address space instead, and are indexed by where each row lies. Only
addresses of rows that exist may be passed: nothing here checks them.
"""

from __future__ import annotations

import ctypes
import math
import sys
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
_MOST_BUFFERS = 16
_IDLE = 2
"""References to a buffer when nobody has a view of it: the list's, and the argument's while they are counted."""


def address_of(array: NDArray[Any]) -> int:
    """Where the array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address


class Buffers:
    """Memory for batches, used again as soon as nobody refers to the batch any more.

    What the allocator gives back to the system comes again page by page, which costs several times the copy itself.
    Not safe among threads.
    """

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any content."""
        size = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(self._bytes(size)[:size]).view(dtype).view(shape)

    def _bytes(self, size: int) -> NDArray[np.uint8]:
        for place in range(len(self._buffers)):
            # A view refers to the buffer that it is of: idle is one that only this list knows.
            if size <= self._buffers[place].nbytes <= 4 * size and sys.getrefcount(self._buffers[place]) == _IDLE:
                return self._buffers[place]
        buffer = np.empty(size + size // 4, np.uint8)
        if len(self._buffers) >= _MOST_BUFFERS:
            self._buffers = [kept for kept in self._buffers if sys.getrefcount(kept) > _IDLE + 1]
        if len(self._buffers) < _MOST_BUFFERS:
            self._buffers.append(buffer)
        return buffer


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


def gather_ragged(addresses: Ints, lengths: Ints, out: Tensor) -> None:
    """The `lengths` elements at each address, end to end, into `out` of their type."""
    memmove, target = ctypes.memmove, out.data_ptr()
    for source, size in zip(addresses.tolist(), (lengths * out.itemsize).tolist(), strict=True):
        memmove(target, source, size)
        target += size


def numbers_at(addresses: Ints) -> Ints:
    """The int64 at each address, a multiple of 8."""
    numbers: Ints = _space(8, 8)[(addresses - _ORIGIN) >> 3].view(np.int64)
    return numbers


@lru_cache(maxsize=64)
def _space(row: int, step: int) -> NDArray[np.void]:
    """Item i is the `row` bytes that begin `i * step` bytes after the origin."""
    start = np.frombuffer(memoryview((ctypes.c_char * row).from_address(_ORIGIN)), f"V{row}")
    return np.lib.stride_tricks.as_strided(start, ((_TOP - _ORIGIN - row) // step,), (step,), writeable=False)

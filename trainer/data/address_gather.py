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
"""Bytes that are gathered before they are cast and put in their place: they stay in the core's own cache."""


def address_of(array: NDArray[Any]) -> int:
    """Where the array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address


def element_of(array: NDArray[Any]) -> int:
    """How many elements of its size after the origin the array begins."""
    return (address_of(array) - _ORIGIN) // array.itemsize


class Rows:
    """Gathers rows of one type and shape; what is the same for every gather is worked out once."""

    def __init__(self, dtype: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
        """`kind` is what the rows of NumPy's `dtype` become."""
        self.width, size = math.prod(shape), np.dtype(dtype).itemsize
        """Elements a row."""
        self.bytes = self.width * size
        self._dtype, self._size, self._shape, self._kind = np.dtype(dtype), size, (-1, *shape), kind
        self._space = _space(self.bytes, size) if 0 < self.bytes <= _WIDEST else None
        self._wider = _wider(self._dtype, kind)
        self._most = max(1, _AT_A_TIME // max(1, self.bytes))

    def __call__(self, elements: Ints) -> Tensor:
        """The rows that begin at these elements: [len(elements), *shape].

        Elements are counted as `element_of` does; all bytes of every row must be mapped.
        """
        if self._wider is None:
            return torch.from_numpy(self._stored(elements)).to(self._kind)
        if len(elements) <= self._most:
            return torch.from_numpy(self._stored(elements).astype(self._wider))
        found = np.empty((len(elements), *self._shape[1:]), self._wider)
        for start in range(0, len(elements), self._most):
            found[start : start + self._most] = self._stored(elements[start : start + self._most])
        return torch.from_numpy(found)

    def _stored(self, elements: Ints) -> NDArray[Any]:
        if self._space is not None:
            return self._space[elements].view(self._dtype).reshape(self._shape)
        rows = np.empty((len(elements), *self._shape[1:]), self._dtype)
        for number, element in enumerate(elements.tolist()):
            ctypes.memmove(address_of(rows) + number * self.bytes, _ORIGIN + element * self._size, self.bytes)
        return rows


def _wider(stored: np.dtype[Any], kind: torch.dtype) -> np.dtype[Any] | None:
    """NumPy's name of `kind` where it is another than what is stored, and nothing can get lost on the way there.

    NumPy casts in the thread that asks. Torch wakes a team of threads that wait for one another in busy loops, one for
    each thread of ours, and takes its memory out of the middle of free pieces, so that it wanders.
    """
    try:
        found: np.dtype[Any] = torch.empty(0, dtype=kind).numpy().dtype
    except TypeError:  # bfloat16 and its like
        return None
    return found if found != stored and np.can_cast(stored, found) else None


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

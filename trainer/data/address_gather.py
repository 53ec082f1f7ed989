"""Gather of rows by their addresses, so that one gather serves any number of memory-mapped shards.

A gather per shard costs microseconds; for a batch of 32 from 64 shards that would exceed the cost of its bytes. The
views below span the whole address space instead, and are indexed by the address of each row. Only addresses of rows
that exist may be passed: nothing here checks them. Offsets within them come from a file, and are checked.
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
"""Below the lowest address that a process may map; NumPy would not accept a view that begins at 0."""
_TOP = 1 << 47
"""End of user space of a 64-bit process on x86-64; other systems map nothing above it unless asked to."""
_WIDEST = 1 << 15
"""Bytes per row; for wider rows, a view's items times their size would not fit into 63 bits."""
_AT_A_TIME = 256 << 10
"""Bytes that are gathered before they are cast and written: they stay in the core's own cache."""


def address_of(array: NDArray[Any]) -> int:
    """Return the address of the array's first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def element_of(array: NDArray[Any]) -> int:
    """Return the offset of the array from the origin, in elements of its size."""
    return (address_of(array) - _ORIGIN) // array.itemsize


class Rows:
    """Gathers rows of one type and shape; values common to all gathers are computed once."""

    def __init__(self, dtype: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
        """Prepare the gather of rows of NumPy's `dtype`, which become torch's `kind`."""
        self.width, size = math.prod(shape), np.dtype(dtype).itemsize
        """Elements per row."""
        self.bytes = self.width * size
        self._dtype, self._size, self._shape, self._kind = np.dtype(dtype), size, (-1, *shape), kind
        self._space = _space(self.bytes, size) if 0 < self.bytes <= _WIDEST else None
        self._wider = _wider(self._dtype, kind)
        self._most = max(1, _AT_A_TIME // max(1, self.bytes))

    def __call__(self, elements: Ints) -> Tensor:
        """Return the rows that begin at these elements: [len(elements), *shape].

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
    """Return the NumPy type of `kind` if the stored type differs and casts to it without loss, else None.

    NumPy casts in the calling thread. Torch would wake a team of threads that wait for one another in busy loops, one
    team for each of our threads, and would allocate in a way that fragments memory.
    """
    try:
        found: np.dtype[Any] = torch.empty(0, dtype=kind).numpy().dtype
    except TypeError:  # bfloat16 and other types that NumPy lacks
        return None
    return found if found != stored and np.can_cast(stored, found) else None


class OffsetsError(ValueError):
    """Offsets of a row lead out of the values of its shard; `row` is its number in the gather."""

    def __init__(self, row: int, first: int, last: int, length: int) -> None:
        super().__init__(f"offsets {first} to {last} of {length} values")
        self.row = row


def gather_ragged(elements: Ints, values: Ints, lengths: Ints, kind: torch.dtype) -> tuple[Tensor, Ints]:
    """Gather rows of different lengths, end to end, and the offsets [len(elements) + 1] between them.

    Args:
        elements: position of each row's offset (`element_of`), which the next row's offset follows.
        values: address of the element at offset 0.
        lengths: number of elements from there on.

    Raises:
        OffsetsError: the offsets of a row are not 0 ≤ first ≤ last ≤ length; nothing was read.
    """
    size = kind.itemsize
    bounds = _space(16, 8)[elements].view(np.int64).reshape(-1, 2)  # a copy: the file may change after the check
    first, last = bounds[:, 0], bounds[:, 1]
    offsets = np.empty(len(elements) + 1, np.int64)
    offsets[0], sizes = 0, offsets[1:]
    np.subtract(last, first, out=sizes)
    # One sign for four comparisons; where first and last are not negative, no difference overflows.
    signs = lengths - last
    signs |= sizes
    signs |= first
    signs |= last
    if np.minimum.reduce(signs, initial=0) < 0:
        row = int(signs.argmin())
        raise OffsetsError(row, int(first[row]), int(last[row]), int(lengths[row]))
    np.add.accumulate(sizes, out=sizes)
    memory, places = _memory(), bounds  # its numbers become addresses in place
    if size != 1:
        places *= size
    places += (values - _ORIGIN)[:, None]
    # Of all methods available in Python, the one with the least work per row.
    content = bytearray().join([memory[start:stop] for start, stop in places.tolist()])
    return torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind), offsets


@lru_cache(maxsize=1)
def _memory() -> memoryview:
    """Return a view of all bytes from the origin on."""
    return memoryview((ctypes.c_char * (_TOP - _ORIGIN)).from_address(_ORIGIN)).cast("B")


@lru_cache(maxsize=64)
def _space(row: int, step: int) -> NDArray[np.void]:
    """Return a view whose item i is the `row` bytes that begin `i * step` bytes after the origin."""
    start = np.frombuffer(memoryview((ctypes.c_char * row).from_address(_ORIGIN)), f"V{row}")
    return np.lib.stride_tricks.as_strided(start, ((_TOP - _ORIGIN - row) // step,), (step,), writeable=False)

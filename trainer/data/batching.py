"""Columns of a batch, and batches split from larger gathers, so that small ones share the cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from everstep.trainer.data.ragged import Ragged

Columns = dict[str, Tensor | Ragged]
"""Row i of each column belongs to one sample."""
ALONE_BYTES, TOGETHER_BYTES = 192 << 10, 1 << 20
"""A piece of at least the first size is gathered alone; smaller ones up to the second size together."""


def split(columns: Columns, bounds: Sequence[int]) -> Iterator[Columns]:
    """Yield the rows between each two bounds, as views."""
    names, sizes = list(columns), [stop - start for start, stop in pairwise(bounds)]
    parts = zip(*(column.split(sizes) for column in columns.values()), strict=True)
    return (dict(zip(names, values, strict=True)) for values in parts)


def pieces(gather: Callable[[int, int], Columns], bounds: Sequence[int], row_bytes: float) -> Iterator[Columns]:
    """Yield the rows between each two bounds, gathered with `gather(start, stop)`.

    Several small pieces share one call; large ones are gathered alone.

    A piece is gathered when it is requested, so that it is in the core's own cache when it is used.

    Args:
        row_bytes: size of a row of all columns; 0 gathers all pieces at once.
    """
    first, last = 0, len(bounds) - 1
    alone, together = (limit / row_bytes if row_bytes else bounds[-1] for limit in (ALONE_BYTES, TOGETHER_BYTES))
    while first < last:
        stop = first + 1
        if bounds[stop] - bounds[first] < alone:
            while stop < last and bounds[stop] - bounds[first] < together:
                stop += 1
        found = gather(bounds[first], bounds[stop])
        if stop == first + 1:
            yield found
        else:
            yield from split(found, [bound - bounds[first] for bound in bounds[first : stop + 1]])
        first = stop

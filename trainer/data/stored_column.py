"""Stored columns: location of a column's samples in the mapped shards, and their gather."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.dataset.index import BYTES, TEXT, Column
from everstep.trainer.data.address_gather import Rows, gather_ragged
from everstep.trainer.data.open_shards import OpenShards
from everstep.trainer.data.order import Ids
from everstep.trainer.data.ragged import Ragged


class StoredColumn(Protocol):
    """A column of a dataset whose shards are open."""

    row_bytes: float
    """Size of a sample as it is gathered; 0 if sizes differ."""

    def places(self, ids: Ids, shards: Ids) -> NDArray[np.int64]:
        """Return the location of these samples of these shards: one row each, for `gather`."""
        ...

    def gather(self, places: NDArray[np.int64]) -> Tensor | Ragged: ...


class FixedColumn:
    """A column whose samples all have one shape."""

    def __init__(self, name: str, column: Column, kind: torch.dtype | None, shards: OpenShards) -> None:
        """Prepare the column; `kind` is the type of the gathered samples, None keeps the stored one."""
        kind = kind or torch_type(column.type)
        self._rows = Rows(column.type, tuple(size or 0 for size in column.shape), kind)
        self._origins = shards.origins[name]
        self.row_bytes = float(self._rows.width * kind.itemsize)

    def places(self, ids: Ids, shards: Ids) -> NDArray[np.int64]:
        return self._origins[shards] + ids * np.int64(self._rows.width)

    def gather(self, places: NDArray[np.int64]) -> Tensor:
        return self._rows(places)


class RaggedColumn:
    """A column whose samples differ in length."""

    row_bytes = 0.0

    def __init__(self, name: str, column: Column, kind: torch.dtype | None, shards: OpenShards) -> None:
        self._stored = torch_type("uint8" if column.type in (TEXT, BYTES) else column.type)
        self._kind = kind or self._stored
        self._origins, self._values = shards.origins[name], shards.values[name]

    def places(self, ids: Ids, shards: Ids) -> NDArray[np.int64]:
        return np.stack([self._origins[shards] + ids, self._values[shards]], axis=1)

    def gather(self, places: NDArray[np.int64]) -> Ragged:
        found, bounds = gather_ragged(places[:, 0], places[:, 1], self._stored)
        return Ragged(found.to(self._kind), torch.from_numpy(bounds))


def stored_column(name: str, column: Column, kind: torch.dtype | None, shards: OpenShards) -> StoredColumn:
    make = RaggedColumn if column.ragged else FixedColumn
    return make(name, column, kind, shards)


@cache
def torch_type(name: str) -> torch.dtype:
    """Return torch's type for NumPy's name of it."""
    return torch.from_numpy(np.empty(0, name)).dtype

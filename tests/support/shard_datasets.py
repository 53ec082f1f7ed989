"""Prepared datasets for tests, written in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from everstep.dataset.index import ShardIndex
from everstep.dataset.shard_format import columns_of, stored, table_of, write_shard
from everstep.storage import open_storage


def write_dataset(folder: str | Path, rows: Sequence[int], columns: dict[str, Any], compression: str = "none") -> None:
    """A dataset with so many rows in each shard; columns are NumPy arrays, or lists of bytes, text or lists."""
    table = pa.table(
        {
            name: table_of({name: column})[name] if isinstance(column, np.ndarray) else pa.array(column)
            for name, column in columns.items()
        }
    )
    table = table.cast(pa.schema([(field.name, stored(field.type)) for field in table.schema]))
    storage = open_storage(str(folder))
    shards, start = [], 0
    for number, count in enumerate(rows):
        shards.append(write_shard(storage, f"shard-{number}.arrow", table.slice(start, count), compression))
        start += count
    ShardIndex(columns_of(table.schema), tuple(shards), {"compression": compression}).write(str(folder))


def numbered(samples: int, width: int = 3, start: int = 0) -> dict[str, np.ndarray]:
    """Columns `id` and `tokens` [samples, width], of which every value tells the sample."""
    ids = np.arange(start, start + samples)
    return {"id": ids, "tokens": (ids[:, None] * 10 + np.arange(width)).astype(np.uint16)}

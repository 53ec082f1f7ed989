"""Shard writer: divides tables into shards of the configured size, the last one smaller."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from everstep.dataset.index import Shard
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.shard_format import write_shard
from everstep.storage import open_storage


def shard_name(unit: int, number: int) -> str:
    """Return the name of a shard; names sort as the samples do."""
    return f"shard-{unit:06d}-{number:03d}.arrow"


class ShardWriter:
    """Writes the shards of one unit; one is written to the disk while the next is filled."""

    def __init__(self, folder: str, unit: int, options: PrepareOptions) -> None:
        self._storage = open_storage(folder)
        self._unit = unit
        self._size = options.shard_bytes
        self._compression = options.compression
        self._pending: list[pa.Table] = []
        self._bytes = 0
        self._writing: Future[Shard] | None = None
        self._pool = ThreadPoolExecutor(1)
        self._shards: list[Shard] = []
        self._number = 0

    def add(self, rows: pa.Table) -> None:
        """Add rows, and write the shards that they fill."""
        if not rows.num_rows:
            return
        self._pending.append(rows)
        self._bytes += rows.nbytes
        while self._bytes >= self._size:
            whole = pa.concat_tables(self._pending)
            cut = min(whole.num_rows, max(1, whole.num_rows * self._size // self._bytes))
            self._write(whole.slice(0, cut))
            rest = whole.slice(cut)
            self._pending, self._bytes = ([rest], rest.nbytes) if rest.num_rows else ([], 0)

    def finish(self) -> list[Shard]:
        """Write the rest; return all shards, durable."""
        if self._pending:
            self._write(pa.concat_tables(self._pending))
        self._wait()
        self._pool.shutdown()
        return self._shards

    def _write(self, rows: pa.Table) -> None:
        self._wait()
        name = shard_name(self._unit, self._number)
        self._number += 1
        self._writing = self._pool.submit(write_shard, self._storage, name, rows, self._compression)

    def _wait(self) -> None:
        if self._writing is not None:
            self._shards.append(self._writing.result())
            self._writing = None

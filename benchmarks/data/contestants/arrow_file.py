"""Writing only: one Arrow IPC file a shard by pyarrow alone, without digests or an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.data.contestants.everstep import as_table
from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import Source


class ArrowFile:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        raise NotImplementedError("it only writes")

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError

    def state(self) -> Any:
        raise NotImplementedError

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        for number, (start, stop) in enumerate(source.pieces()):
            table = as_table(source, start, stop)
            with (
                pa.OSFile(str(folder / f"{number:05d}.arrow"), "wb") as file,
                pa.ipc.new_file(file, table.schema) as out,
            ):
                out.write_table(table)


if __name__ == "__main__":
    serve(ArrowFile)

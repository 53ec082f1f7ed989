"""Writing only: one Arrow IPC file a shard by pyarrow alone, without digests or an index."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from benchmarks.data.contestants.everstep import as_table
from benchmarks.data.reader import serve_writer
from benchmarks.data.source import Source


class ArrowFile:
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
    serve_writer(ArrowFile)

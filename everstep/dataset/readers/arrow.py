"""Arrow IPC files and streams: Feather, shards, and the format of Hugging Face's `save_to_disk`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from everstep.dataset.readers.base import (
    Chunk,
    File,
    Piece,
    WholeFiles,
    in_parallel,
    refuse_others,
    row_of,
    spread,
)
from everstep.dataset.readers.source_files import is_url, open_file, read_file
from everstep.errors import DataError

MAGIC = b"ARROW1"


class Arrow(WholeFiles):
    """Reads Arrow IPC files, divided by record batches, and streams."""

    def open(self, files: Sequence[File]) -> pa.Schema:
        return self.together(in_parallel(lambda file: _opened(file).schema, spread(files)))

    def cut(self, file: File, size: int) -> list[Piece]:
        opened = _opened(file) if file.size > size else None
        if not isinstance(opened, pa.RecordBatchFileReader):
            return super().cut(file, size)
        batches = opened.num_record_batches
        step = max(1, batches * size // file.size)
        starts = range(0, batches, step)
        return [Piece(file, start, min(batches, start + step), file.size // len(starts)) for start in starts]

    def read_one(self, piece: Piece, schema: pa.Schema) -> Iterator[Chunk]:
        opened, row = _opened(piece.file), 0
        refuse_others(piece.file, opened.schema.names, schema.names, self.allowed)
        try:
            if isinstance(opened, pa.RecordBatchFileReader):
                stop = opened.num_record_batches if piece.stop is None else piece.stop
                batches = (opened.get_batch(number) for number in range(piece.start, stop))
            else:
                batches = iter(opened)
            for batch in batches:
                part = f"batch {piece.start}, " if piece.start else ""
                yield Chunk(pa.table(batch.select(schema.names)), _row_of(piece.file, part, row))
                row += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{piece.file.url} is damaged after row {row}: {error}") from error


class HuggingFace(Arrow):
    """Reads a folder of `Dataset.save_to_disk`: the Arrow files that its state.json lists."""

    def choose(self, files: Sequence[File]) -> list[File]:
        chosen = []
        splits = sorted({os.path.dirname(file.url) for file in files if file.url.endswith("/state.json")})
        if len(splits) > 1:
            raise DataError(f"src holds {len(splits)} splits; give one, as src={splits[0]}")
        for state in (file for file in files if os.path.basename(file.url) == "state.json"):
            listed = [entry["filename"] for entry in json.loads(read_file(state))["_data_files"]]
            there = {os.path.basename(f.url): f for f in files if os.path.dirname(f.url) == os.path.dirname(state.url)}
            missing = [name for name in listed if name not in there]
            if missing:
                raise DataError(f"{state.url} lists {missing[0]}, which is not there")
            chosen += [there[name] for name in listed]
        if not chosen:
            raise DataError("src holds no state.json as Dataset.save_to_disk writes it; set format=arrow")
        return chosen


def _row_of(file: File, part: str, row: int) -> Any:
    return (lambda n: f"{file.url}: {part}row {row + n + 1}") if part else row_of(file, row)


def _opened(file: File) -> Any:
    try:
        source = open_file(file) if is_url(file.url) else pa.memory_map(file.url)
        head = source.read(len(MAGIC))
        source.seek(0)
        return pa.ipc.open_file(source) if head == MAGIC else pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.url} is no Arrow file ({str(error).splitlines()[0]}); set format=") from error

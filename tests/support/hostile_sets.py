"""Datasets whose files are sound Arrow with true digests, and whose content attacks the reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from blake3 import blake3

from everstep.dataset.index import Column, Shard, ShardIndex
from everstep.dataset.shard_format import file_parts

STRIDE = 16
"""Bytes of each row before its offsets are overwritten."""


def ragged_set(folder: Path, offsets: list[int], kind: str = "bytes", values: int = 64) -> Path:
    """Write a dataset of one shard and overwrite the offsets of its column in place."""
    folder.mkdir(parents=True, exist_ok=True)
    sound = np.arange(len(offsets), dtype=np.int64) * STRIDE
    buffers = [None, pa.py_buffer(sound.tobytes())]
    if kind == "bytes":
        array = pa.Array.from_buffers(
            pa.large_binary(), len(offsets) - 1, [*buffers, pa.py_buffer(bytes(range(values)))]
        )
    else:
        child = pa.array(np.arange(values, dtype=kind))
        array = pa.Array.from_buffers(pa.large_list(child.type), len(offsets) - 1, buffers, children=[child])
    path = folder / "shard-0.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("text", array.type)])) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([array], names=["text"]))
    content = path.read_bytes()
    assert content.count(sound.tobytes()) == 1
    path.write_bytes(content.replace(sound.tobytes(), np.array(offsets, np.int64).tobytes()))
    index_of(folder, {"text": Column(kind, (None,))}, len(offsets) - 1)
    return folder


def index_of(folder: Path, columns: dict[str, Column], rows: int) -> None:
    """Write an index with the true size and digests of the folder's only shard."""
    path = folder / "shard-0.arrow"
    shard = Shard(path.name, rows, os.path.getsize(path), file_parts(str(path)))
    ShardIndex(columns, (shard,), {}).write(str(folder))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the index and give it the digest that fits, as far as there is one."""
    document = json.loads((folder / "index.json").read_text())
    edit(document)
    try:
        content = [
            sorted((name, column["type"], column["shape"]) for name, column in document["columns"].items()),
            [(s["rows"], blake3("".join(s["parts"]).encode()).hexdigest(length=16)) for s in document["shards"]],
        ]
        document["digest"] = blake3(json.dumps(content).encode()).hexdigest()
    except (TypeError, KeyError, AttributeError):
        pass
    (folder / "index.json").write_text(json.dumps(document))

"""Reader of W&B's own files of earlier attempts, so that no step is written twice.

A file is LevelDB's log format (blocks of 32 KiB, records in parts) around protocol buffers; a kill may truncate it
anywhere.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_MAGIC_BYTES = 7


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics in one file."""
    from wandb.proto import wandb_internal_pb2

    for content in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def last_steps(folder: Path, identity: str) -> dict[str, int]:
    """Return, by kind of record (train, evaluate), the highest step in the files of a run below `folder`."""
    last: dict[str, int] = {}
    for file in sorted(folder.glob(f"wandb/*/run-{identity}.wandb")):
        for row in rows(file):
            for kind in {name.partition("/")[0] for name in row if "/" in name}:
                last[kind] = max(last.get(kind, 0), int(row.get("step", 0)))
    return last


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the whole records of a file, without one truncated at its end."""
    place, whole = _MAGIC_BYTES, b""
    while place + _HEADER.size <= len(data):
        if (left := BLOCK - place % BLOCK) < _HEADER.size:
            place += left
            continue
        _, length, part = _HEADER.unpack_from(data, place)
        place += _HEADER.size
        if part not in (_FULL, _FIRST, _MIDDLE, _LAST) or place + length > len(data):
            return
        whole = data[place : place + length] if part in (_FULL, _FIRST) else whole + data[place : place + length]
        place += length
        if part in (_FULL, _LAST):
            yield whole

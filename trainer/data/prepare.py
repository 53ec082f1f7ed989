"""From documents to a dataset: byte tokens, cut into blocks, split by file, written as Arrow shards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from trainer.data.index import INDEX, Column, Shard, ShardIndex
from trainer.data.shards import file_parts, table_of, write_shard
from trainer.errors import ConfigError, DataError
from trainer.storage import open_storage

SEPARATOR = b"\0"
SHARD_BYTES = 64 << 20
TRAIN, VALIDATION = "train", "validation"


def prepare_blocks(
    documents: Iterable[tuple[str, bytes]],
    dst: str,
    block: int,
    *,
    validation_every: int = 20,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `dst`/train and `dst`/validation, datasets of one column `tokens`: uint8 [block + 1].

    Documents (name, content) are joined with a zero byte between them and cut into blocks of `block` + 1
    bytes, the last of which is only ever a target. Every `validation_every`-th document is held out. What
    is left at the end, less than a block, is not used. `dst` appears as a whole or not at all; when two
    processes prepare it at once, the first to finish wins and the other one's work is dropped.
    """
    if block < 1:
        raise ConfigError(f"block={block} must be at least 1 byte")
    if validation_every < 2:
        raise ConfigError(f"validation_every={validation_every} must be at least 2, or nothing is left to train on")
    with _appearing_whole(dst) as folder:
        splits = {split: BlockWriter(os.path.join(folder, split), block, shard_bytes) for split in (TRAIN, VALIDATION)}
        count = 0
        for count, (_, content) in enumerate(documents, start=1):
            splits[TRAIN if count % validation_every else VALIDATION].add(content)
        for split, writer in splits.items():
            if not writer.finish({"block": block, "validation_every": validation_every, "split": split}):
                raise DataError(
                    f"{count} documents give no {split} block of {block + 1} bytes; add documents, or choose "
                    f"a smaller block or another validation_every (now {validation_every})"
                )


class BlockWriter:
    """Collects documents and writes one dataset folder of byte blocks, shard by shard."""

    def __init__(self, folder: str, block: int, shard_bytes: int) -> None:
        os.makedirs(folder)
        self._folder = folder
        self._width = block + 1
        self._shard_size = max(1, shard_bytes // self._width) * self._width
        self._pending = bytearray()
        self._shards: list[Shard] = []

    def add(self, content: bytes) -> None:
        """Append one document, and write the shards that it fills."""
        self._pending += content
        self._pending += SEPARATOR
        while len(self._pending) >= self._shard_size:
            self._write(self._shard_size)

    def finish(self, attributes: dict[str, object]) -> int:
        """Write the rest and the index; returns the number of blocks in all."""
        rest = len(self._pending) // self._width * self._width
        if rest:
            self._write(rest)
        columns = {"tokens": Column("uint8", (self._width,))}
        index = ShardIndex(columns, tuple(self._shards), attributes)
        index.write(self._folder)
        return index.rows

    def _write(self, size: int) -> None:
        tokens = np.frombuffer(bytes(self._pending[:size]), dtype=np.uint8).reshape(-1, self._width)
        del self._pending[:size]
        name = f"shard-{len(self._shards):05d}.arrow"
        self._shards.append(write_shard(open_storage(self._folder), name, table_of({"tokens": tokens})))


def prepared(dst: str) -> bool:
    """Whether `dst` holds both splits of a prepared dataset."""
    return all(os.path.exists(os.path.join(dst, split, INDEX)) for split in (TRAIN, VALIDATION))


def verify(path: str) -> list[str]:
    """Check every shard of the dataset in folder `path` against its index; one line for each bad one.

    A folder with train and validation in it is checked as both. DataError where there is no dataset.
    """
    if prepared(path):
        return [line for split in (TRAIN, VALIDATION) for line in verify(os.path.join(path, split))]
    return [line for shard in ShardIndex.read(path).shards for line in _damage(path, shard)]


def _damage(folder: str, shard: Shard) -> Iterator[str]:
    path = os.path.join(folder, shard.file)
    if not os.path.exists(path):
        yield f"{path} is missing"
    elif os.path.getsize(path) != shard.bytes:
        yield f"{path} is {os.path.getsize(path)} bytes where the index says {shard.bytes}"
    elif file_parts(path) != shard.parts:
        yield f"{path} is damaged: its digests are not those in the index"


@contextmanager
def _appearing_whole(dst: str) -> Iterator[str]:
    """A folder beside `dst` that takes its name at the end, unless another process was first."""
    if os.path.lexists(dst) and not prepared(dst) and not (os.path.isdir(dst) and not os.listdir(dst)):
        raise DataError(f"{dst} exists and is no prepared dataset; choose another folder or remove it")
    parent, name = os.path.split(os.path.abspath(dst))
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
        yield folder
        os.chmod(folder, 0o755)
        try:
            os.rename(folder, dst)
        except OSError:
            if not prepared(dst):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)

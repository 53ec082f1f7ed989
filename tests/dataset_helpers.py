"""What tests of prepared datasets share."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa

from trainer.data.index import ShardIndex


def lines(folder: Path, count: int = 400, files: int = 3) -> list[str]:
    """Write `count` lines into some files; the lines in order."""
    folder.mkdir(exist_ok=True)
    draws = random.Random(1)
    texts = [f"{n} " + "x" * draws.randint(0, 60) for n in range(count)]
    for number in range(files):
        part = texts[number * count // files : (number + 1) * count // files]
        (folder / f"{number}.txt").write_text("".join(f"{text}\n" for text in part))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SMALL = {"shard_mib": 2 / 1024}
"""2 kB: some twenty units of some shards."""


def read(folder: Path, split: str = "") -> pa.Table:
    """The samples as any Arrow tool sees them."""
    index = ShardIndex.read(str(folder / split))
    files = [str(folder / split / shard.file) for shard in index.shards]
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(file)).read_all() for file in files])

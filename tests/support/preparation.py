"""What tests of prepared datasets share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.prepare.plan import plan
from everstep.dataset.prepare.work_unit import cleaned
from everstep.dataset.readers.base import Bad
from everstep.dataset.readers.format_detection import open_source


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


class Outcome(NamedTuple):
    """What a preparation made of a source."""

    table: pa.Table
    places: list[str]
    """Of the bad records."""
    reasons: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.table.to_pylist())

    def column(self, name: str) -> Any:
        return self.table[name].to_numpy()


def outcome(src: Path, **options: Any) -> Outcome:
    """All good rows of a source and what is said of the others, as `prepare` reads them; nothing is written."""
    chosen = PrepareOptions(**{"src": [str(src)], "dst": str(src.parent / "set"), "max_bad": 10**6, **options})
    todo = plan(chosen, *open_source(chosen))
    bad: list[Bad] = []
    tables = [rows for unit in todo.units for rows in cleaned(todo.job, unit, bad, lambda rows, size: None)]
    table = pa.concat_tables(tables) if tables else todo.job.target.empty_table()
    return Outcome(table, [one.place for one in bad], [one.reason for one in bad])

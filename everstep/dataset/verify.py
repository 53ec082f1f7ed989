"""Verification of a dataset against its index, part by part, on a disk or in a store; and its repair."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

from everstep.dataset.index import PART_BYTES, TRAIN, VALIDATION, Column, Shard, ShardIndex, part_digest
from everstep.dataset.mapped_shard import check_offsets, map_shard
from everstep.dataset.prepare.ledger import Ledger, folder_of
from everstep.errors import DataError
from everstep.storage import Storage, join_url, open_storage
from everstep.storage.names import leads_out

PARTS_AT_ONCE = 4
"""Parts of one shard that are held in memory; verification needs this many for each thread."""
NAMED = 8
"""Damaged parts that a message lists by number."""


@dataclass(frozen=True)
class Damage:
    """One shard that differs from the index."""

    folder: str
    shard: Shard
    what: str

    def __str__(self) -> str:
        return f"{join_url(self.folder, self.shard.file)} {self.what}"


def datasets(dst: str) -> list[str]:
    """Return the dataset in `dst`, or those of its splits.

    Raises:
        DataError: the preparation of `dst` is not finished.
    """
    if open_storage(dst).exists("index.json"):
        return [dst]
    splits = [folder_of(dst, split) for split in (TRAIN, VALIDATION)]
    there = [split for split in splits if open_storage(split).exists("index.json")]
    if not there and Ledger(dst).under_way() is not None:
        raise DataError(f"{dst} is not finished: give the same `everstep data prepare` again to go on")
    return there or [dst]


def verify(dst: str, done: Callable[[int], None] = lambda size: None) -> list[Damage]:
    """Check every part of every shard against the index, several at a time.

    Args:
        done: called with the bytes of each checked shard.
    """

    def check(one: tuple[str, Shard]) -> Damage | None:
        folder, shard = one
        what = _what(open_storage(folder), shard, indexes[folder].columns, indexes[folder].is_compressed)
        done(shard.bytes)
        return Damage(folder, shard, what) if what else None

    indexes = {folder: ShardIndex.read(folder) for folder in datasets(dst)}
    shards = [(folder, shard) for folder, index in indexes.items() for shard in index.shards]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        return [damage for damage in pool.map(check, shards) if damage is not None]


def repair(damages: list[Damage], dst: str, source: str) -> Iterator[tuple[Damage, str]]:
    """Replace damaged shards by those of another copy of the dataset.

    Yield (damage, reason why it was not repaired) for each; the reason is empty after a repair.
    """
    theirs = {shard.digest: (folder, shard) for folder in datasets(source) for shard in ShardIndex.read(folder).shards}
    for damage in damages:
        folder, shard = theirs.get(damage.shard.digest, ("", None))
        if shard is None:
            yield damage, f"{source} has no shard with digest {damage.shard.digest}; is it a copy of {dst}?"
            continue
        try:
            _copy(open_storage(folder), shard, open_storage(damage.folder), damage.shard)
        except _NotGoodError as error:
            yield damage, f"{join_url(folder, shard.file)} {error}"
        else:
            yield damage, ""


class _NotGoodError(Exception):
    """The copy is damaged too."""


def _copy(source: Storage, there: Shard, storage: Storage, shard: Shard) -> None:
    """Copy a shard from `source`; a damaged part aborts the copy and leaves the old file unchanged."""
    try:
        with storage.writer(shard.file) as target:
            for number, part in enumerate(_parts(source, there)):
                if part_digest(part) != shard.parts[number]:
                    raise _NotGoodError(f"is damaged too: part {number}")
                target.write(part)
    except FileNotFoundError:
        raise _NotGoodError("is missing too") from None


def _what(storage: Storage, shard: Shard, columns: Mapping[str, Column], compressed: bool) -> str:
    """Return the fault of a shard; empty if it has none."""
    if leads_out(storage, "", shard.file):
        return "is a link out of its dataset's folder"
    bad: list[int] = []
    try:
        size = storage.size(shard.file)
        if size != shard.bytes:
            return f"is {size} bytes where the index says {shard.bytes}"
        with _copy_of(storage, shard) as (path, copy):
            for number, part in enumerate(_parts(storage, shard)):
                if part_digest(part) != shard.parts[number]:
                    bad.append(number)
                if copy is not None and not bad:
                    copy.write(part)
            if not bad:
                return _misfit(path, shard, columns, compressed)
    except FileNotFoundError:
        return "is missing"
    named = ", ".join(map(str, bad[:NAMED])) + (" …" if len(bad) > NAMED else "")
    return f"is damaged: part {named} of {len(shard.parts)} does not match its digest"


@contextmanager
def _copy_of(storage: Storage, shard: Shard) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Yield a local path for the shard, and the file there to write if the shard is in a store."""
    if (path := storage.path(shard.file)) is not None:
        yield str(path), None
        return
    with tempfile.NamedTemporaryFile(prefix="everstep-verify-", buffering=0) as copy:
        yield copy.name, cast(IO[bytes], copy)


def _misfit(path: str, shard: Shard, columns: Mapping[str, Column], compressed: bool) -> str:
    """Return the reason why a reader cannot use the content of a shard, though its digests are right."""
    try:
        mapped = map_shard(path, columns, compressed)
        check_offsets(path, mapped)
    except DataError as error:
        return f"does not hold what the index promises: {str(error).replace(path, shard.file)}"
    return "" if mapped.rows == shard.rows else f"has {mapped.rows} rows where the index says {shard.rows}"


def _parts(storage: Storage, shard: Shard) -> Iterator[memoryview]:
    """Yield the parts of a shard's file, read a few at a time."""
    step = PARTS_AT_ONCE * PART_BYTES
    for start in range(0, shard.bytes, step):
        data = memoryview(storage.read_range(shard.file, start, min(start + step, shard.bytes)))
        for first in range(0, len(data), PART_BYTES):
            yield data[first : first + PART_BYTES]

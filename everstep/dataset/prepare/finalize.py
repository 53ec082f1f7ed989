"""Publication of a dataset: the last tokens, the index of each split, and removal of leftovers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from everstep.dataset.index import Shard, ShardIndex
from everstep.dataset.prepare.ledger import MADE, Ledger, folder_of, unit_of
from everstep.dataset.prepare.plan import Plan
from everstep.dataset.prepare.progress import counted
from everstep.dataset.prepare.shard_writer import ShardWriter
from everstep.dataset.prepare.tokenizers import Packer
from everstep.dataset.prepare.work_unit import Record
from everstep.dataset.shard_format import columns_of
from everstep.dataset.tags import TAGS
from everstep.errors import DataError

MUST_AGREE = ("tokenizer", "separator", "vocab", "pack", "classes", TAGS)
"""Attributes that must be equal in all parts of a dataset."""
COUNTS = {"files", "left_out_tokens"}
"""Attributes that are summed."""


def based(todo: Plan, ledger: Ledger) -> Plan:
    """Return the plan, numbered after the existing shards with append=true.

    The number is recorded, so that a restart uses the same.
    """
    old = _old(todo, ledger) if todo.job.options.append else {}
    mine = {"options": todo.made_by, "source": todo.made_of, "append": todo.job.options.append}
    begun = ledger.under_way()
    if begun is not None and {name: begun[name] for name in mine} == mine:
        base = int(begun["base"])
    else:
        shards = [shard for index in old.values() for shard in index.shards]
        base = 1 + max((unit_of(shard.file) for shard in shards), default=-1)
        before = {split: dict(index.attributes) for split, index in old.items()}
        ledger.begin({**mine, "base": base, "before": before})
    return replace(todo, job=replace(todo.job, base=base))


def _old(todo: Plan, ledger: Ledger) -> dict[str, ShardIndex]:
    """Return the datasets to append to.

    Raises:
        DataError: the new samples have other columns or attributes than the existing ones.
    """
    dst = todo.job.options.dst
    if not ledger.complete():
        raise DataError(f"append=true: {dst} is no dataset yet; prepare it without append first")
    old = {}
    for split in todo.job.splits:
        index = old[split] = ShardIndex.read(folder_of(dst, split))
        columns = columns_of(todo.job.output)
        if dict(index.columns) != columns:
            raise DataError(f"append=true: {dst} has columns {_named(index.columns)}, src gives {_named(columns)}")
        for name in MUST_AGREE:
            there, now = index.attributes.get(name), todo.attributes.get(name)
            if there != now:
                raise DataError(f"append=true: {dst} has {name}={there}, now {name}={now}")
    return old


def _named(columns: Any) -> str:
    return ", ".join(f"{name} {column.type}{list(column.shape)}" for name, column in columns.items())


def publish(todo: Plan, records: Sequence[Record], ledger: Ledger, say: Callable[[str], None]) -> dict[str, ShardIndex]:
    """Write the indexes, that of the training data last, and remove files that belong to none."""
    job = todo.job
    indexes: dict[str, ShardIndex] = {}
    old = _old(todo, ledger) if job.options.append else {}
    told = (ledger.under_way() or {}).get("before", {})
    for split in job.splits:
        tail, left_out = _tail(todo, records, split)
        shards = [shard for record in records for shard in record.shards[split]] + tail
        before = [shard for shard in old[split].shards if unit_of(shard.file) < job.base] if split in old else []
        attributes = _attributes(todo, split, left_out, told.get(split, {}))
        indexes[split] = ShardIndex(columns_of(job.output), (*before, *shards), attributes)
        if not shards:
            ledger.end({})
            raise DataError(_nothing(todo, split))
    bad = [one._asdict() for record in records for one in record.bad]
    ledger.write_bad(bad, job.options.append)
    for split in reversed(job.splits):
        indexes[split].write(folder_of(job.options.dst, split))
    ledger.end({split: {shard.file for shard in index.shards} for split, index in indexes.items()})
    _report(indexes, records, len(bad), say)
    return indexes


def _attributes(todo: Plan, split: str, left_out: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of the dataset; with append=true, of all its preparations."""
    found = {**todo.attributes, **({"split": split} if split else {})}
    found |= {"left_out_tokens": left_out} if todo.job.options.pack else {}
    for name in COUNTS & found.keys():
        found[name] += before.get(name, 0)
    found["src"] = list(dict.fromkeys([*before.get("src", []), *found["src"]]))
    made = [*before.get(MADE, []), *([todo.mark] if todo.mark else [])]
    return found | ({MADE: made} if made else {})


def _tail(todo: Plan, records: Sequence[Record], split: str) -> tuple[list[Shard], int]:
    """Write a last shard of the tokens that filled no block in their units.

    Return it, and the number of tokens that fill no block together.
    """
    job = todo.job
    if not job.options.pack:
        return [], 0
    kind = np.dtype(job.output.field(0).type.value_type.to_pandas_dtype())
    packer = Packer(job.options.pack + 1, todo.attributes["separator"], kind)
    joined = np.frombuffer(b"".join(record.tails[split] for record in records), kind)
    writer = ShardWriter(folder_of(job.options.dst, split), job.base + len(todo.units), job.options)
    writer.add(packer.cut(joined).cast(pa.schema(job.output)))
    return writer.finish(), len(packer.tail)


def _nothing(todo: Plan, split: str) -> str:
    options, name = todo.job.options, split or "dataset"
    if options.pack:
        return f"src gives no {name} block of {options.pack + 1} tokens; add documents or set pack= lower"
    return f"src gives no {name} sample; set src=" + (" or validation=" if split else "")


def _report(indexes: dict[str, ShardIndex], records: Sequence[Record], bad: int, say: Callable[[str], None]) -> None:
    duplicates = sum(record.duplicates for record in records)
    for split, index in indexes.items():
        left = index.attributes.get("left_out_tokens")
        say(
            f"{split or 'dataset'}: {counted(index.rows, 'sample')} in {counted(len(index.shards), 'shard')}, "
            f"{index.bytes / 1e6:,.1f} MB"
            + (f"; {counted(left, 'token')}, less than a block, left out" if left else "")
        )
    if bad or duplicates:
        say(f"left out: {counted(bad, 'bad record')} (bad.jsonl), {counted(duplicates, 'duplicate')}")

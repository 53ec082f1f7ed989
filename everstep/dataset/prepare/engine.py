"""Preparation of any source as a dataset of Arrow shards.

The bytes are the same for any number of processes, and after any number of kills. The work is divided into units; each
leaves a record when its shards are durable; the index is written last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.dataset.index import TRAIN, VALIDATION, ShardIndex, part_digest
from everstep.dataset.prepare.finalize import based, publish
from everstep.dataset.prepare.ledger import Ledger
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.prepare.plan import Plan, plan, unit_digest
from everstep.dataset.prepare.progress import Progress
from everstep.dataset.prepare.schema_cast import Digests, first_ones
from everstep.dataset.prepare.tokenizers import BYTES
from everstep.dataset.prepare.work_unit import Record, TooManyBadError, digest_unit, refuse_bad, write_unit
from everstep.dataset.prepare.worker_pool import in_parallel
from everstep.dataset.readers.base import File, Reader
from everstep.dataset.readers.format_detection import open_source
from everstep.dataset.readers.in_memory import Documents, Generator, Row, Table, in_memory
from everstep.errors import ConfigError, DataError

__all__ = ["prepare", "prepare_arrays", "prepare_blocks", "prepare_frame", "prepare_rows"]

Indexes = dict[str, ShardIndex]
"""Split → index; the split is "" when nothing is held out."""
Open = Callable[[], tuple[Reader, list[File]]]


def prepare(options: PrepareOptions, *, show: bool = False) -> Indexes:
    """Prepare files into `options.dst`; a preparation that was killed resumes."""
    return _prepare(options, lambda: open_source(options), show=show)


def prepare_frame(frame: Any, dst: str, **options: Any) -> Indexes:
    """Prepare a pandas, Polars or Arrow table from memory; keywords as in PrepareOptions."""
    import pyarrow as pa

    try:
        if type(frame).__module__.startswith("pandas"):
            table = pa.Table.from_pandas(frame, preserve_index=False)
        else:
            table = frame if isinstance(frame, pa.Table) else pa.table(frame)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the frame cannot become Arrow columns: {str(error).splitlines()[0]}") from error
    return _from_memory(Table(table), "the frame", table.nbytes, dst, options)


def prepare_arrays(arrays: dict[str, NDArray[Any]], dst: str, **options: Any) -> Indexes:
    """Prepare NumPy arrays [samples, …] from memory without a copy; keywords as in PrepareOptions."""
    import pyarrow as pa

    from everstep.dataset.shard_format import table_of

    try:
        table = table_of(arrays)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the arrays cannot become Arrow columns: {str(error).splitlines()[0]}") from error
    return _from_memory(Table(table), "the arrays", table.nbytes, dst, options)


def prepare_rows(function: Callable[[], Iterable[Row]], dst: str, **options: Any) -> Indexes:
    """Prepare the mappings of column to value that `function` yields.

    It is called once more, to find the columns from the first values.
    """
    return _from_memory(Generator(function), "the rows", 0, dst, options)


def prepare_blocks(
    documents: Iterable[tuple[str, bytes]],
    dst: str,
    block: int,
    *,
    tokenizer: str = BYTES,
    validation_every: int = 20,
    shard_bytes: int = 64 << 20,
) -> None:
    """Write `dst`/train and `dst`/validation, datasets of one column `tokens`: integers [block + 1].

    Documents (name, content) are joined with a separator after each (zero for bytes) and split into blocks of `block` +
    1 tokens. Every `validation_every`-th document is held out. If two processes do this at once, the second waits and
    then uses the dataset.
    """
    if block < 1:
        raise ConfigError(f"block={block} must be at least 1 token")
    if validation_every < 2:
        raise ConfigError(f"validation_every={validation_every} must be at least 2, or nothing is left to train on")
    options = PrepareOptions(dst=dst, tokenizer=tokenizer, pack=block, shard_mib=shard_bytes / 2**20)
    files = [in_memory("the documents")]
    _prepare(options, lambda: (Documents(documents), files), every=validation_every, ready_is_fine=True)


def prepared(dst: str) -> bool:
    """True if `dst` holds both splits of a prepared dataset."""
    return all(os.path.exists(os.path.join(dst, split, "index.json")) for split in (TRAIN, VALIDATION))


def _from_memory(reader: Reader, name: str, size: int, dst: str, options: dict[str, Any]) -> Indexes:
    typed = PrepareOptions(**{**options, "dst": dst})
    return _prepare(typed, lambda: (reader, [in_memory(name, size)]))


def _prepare(
    options: PrepareOptions, source: Open, *, every: int = 0, ready_is_fine: bool = False, show: bool = False
) -> Indexes:
    progress = Progress("prepare", 1, show)
    ledger = Ledger(options.dst)
    waited: list[str] = []

    def waits(text: str) -> None:
        waited.append(text)
        progress.line(text)

    ledger.refuse_foreign()
    with ledger.held(waits), ledger.untouched_by_mistakes():
        is_there = ledger.complete()
        if is_there and not options.append and (waited or ready_is_fine):
            ledger.clear_up()
            return ledger.indexes()
        todo = plan(options, *source(), every)
        if is_there and _is_done(todo, ledger, progress.line):
            return ledger.indexes()
        ledger.sweep_staged()
        todo = based(todo, ledger)
        with Progress("prepare", todo.size * (2 if options.dedup else 1), show) as progress:
            try:
                records = _records(todo, ledger, progress)
            except TooManyBadError as error:
                ledger.write_bad([one._asdict() for one in error.bad], options.append)
                raise
        return publish(todo, records, ledger, progress.line)


def _is_done(todo: Plan, ledger: Ledger, say: Callable[[str], None]) -> bool:
    """True if the existing dataset is the one to be made; DataError if it differs and append is not set."""
    is_done, append = ledger.holds(todo.mark), todo.job.options.append
    if is_done or not append:
        ledger.clear_up()
    if is_done:
        say(f"{ledger.dst} holds this source already, prepared in the same way: nothing is left to do")
    elif not append:
        raise DataError(
            f"{ledger.dst} is a dataset already, of another source or prepared in another way; "
            "choose another dst, append=true, or remove it"
        )
    return is_done


def _records(todo: Plan, ledger: Ledger, progress: Progress) -> list[Record]:
    """Process the units that are not done yet; return the records of all, in order."""
    options = todo.job.options
    masks = _masks(todo, ledger, progress) if options.dedup else [None] * len(todo.units)
    made_of = [
        {
            "options": f"{todo.made_by}-{todo.job.base}",
            "source": unit_digest(unit) + (part_digest(mask.tobytes()) if mask is not None else ""),
        }
        for unit, mask in zip(todo.units, masks, strict=True)
    ]
    records = _finished(made_of, ledger, progress)
    left = [unit for unit in todo.units if unit.number not in records]
    progress.skip(sum(unit.size for unit in todo.units if unit.number in records))
    calls = [(todo.job, unit, masks[unit.number]) for unit in left]
    bad = [bad for record in records.values() for bad in record.bad]
    with closing(in_parallel(write_unit, calls, _many(options), progress.add, todo.job.reader.stays)) as done:
        for call, record in done:
            number = left[call].number
            bad += record.bad
            refuse_bad(bad, options.max_bad, options.dst)
            ledger.note(number, made_of[number], record)
            records[number] = record
    return [records[unit.number] for unit in todo.units]


def _finished(made_of: list[dict[str, str]], ledger: Ledger, progress: Progress) -> dict[int, Record]:
    """Return records of units that are done from the same source and options; report those to be redone."""
    found: dict[int, Record] = {}
    changed: dict[str, int] = {}
    for number in ledger.noted():
        note = ledger.record(number)
        if note is None:
            continue
        now = made_of[number] if number < len(made_of) else {}
        other = next((name for name in ("options", "source") if note[name] != now.get(name)), None)
        if other is None:
            found[number] = Record.from_json(note["record"])
        else:
            changed[other] = changed.get(other, 0) + 1
    if found:
        progress.line(f"goes on: {len(found)} of {len(made_of)} units are done")
    for what, count in changed.items():
        progress.line(f"the {what} changed since: {count} units that were done start anew")
    return found


def _masks(todo: Plan, ledger: Ledger, progress: Progress) -> list[NDArray[np.bool_]]:
    """Return a mask per unit: True for rows that are the first with their content, in the order of units."""
    names = [f"digests-{unit.number:06d}-{todo.made_by}-{unit_digest(unit)}" for unit in todo.units]
    found: dict[int, Digests] = {}
    for unit, name in zip(todo.units, names, strict=True):
        noted = ledger.digests(name)
        if noted is not None:
            found[unit.number] = np.frombuffer(noted, np.uint64).reshape(-1, 2)
            progress.skip(unit.size)
    left = [unit for unit in todo.units if unit.number not in found]
    calls = [(todo.job, unit) for unit in left]

    def say(rows: int, size: int) -> None:
        progress.add(0, size)  # the rows are counted when they are written

    with closing(in_parallel(digest_unit, calls, _many(todo.job.options), say, todo.job.reader.stays)) as done:
        for call, digests in done:
            ledger.note_digests(names[left[call].number], digests.tobytes())
            found[left[call].number] = digests
    return first_ones([found[unit.number] for unit in todo.units])


def _many(options: PrepareOptions) -> int:
    return options.processes or len(os.sched_getaffinity(0))

"""One unit of work: read, clean, tokenise, split, and write its shards.

It runs in any process, with the same result each time.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from everstep.dataset.index import TRAIN, VALIDATION, Shard
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.prepare.schema_cast import Digests, clean, held_out, row_digests
from everstep.dataset.prepare.shard_writer import ShardWriter
from everstep.dataset.prepare.tokenizers import TOKENS, Packer, open_tokenizer, ragged, token_type
from everstep.dataset.readers.base import Bad, Chunk, Reader, Unit
from everstep.errors import DataError
from everstep.security.secret_detection import without_secrets
from everstep.storage import join_url

Say = Callable[[int, int], None]
"""Function that is called with the rows and bytes done since its last call."""


@dataclass(frozen=True)
class Job:
    """Facts that all units of a preparation share."""

    options: PrepareOptions
    reader: Reader
    source: pa.Schema
    """Columns to read."""
    target: pa.Schema
    """These columns as they are stored (before the text is tokenised)."""
    output: pa.Schema
    """Columns of the dataset."""
    text: str | None = None
    """Column to tokenise."""
    every: int = 0
    """Hold out every n-th sample, if there is one unit; 0 uses `validation`."""
    base: int = 0
    """Number of the first unit's shards: above those of a dataset that is appended to."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Folders of the datasets below dst."""
        return (TRAIN, VALIDATION) if self.options.validation or self.every else ("",)

    @property
    def content(self) -> list[str]:
        """Columns by which two samples count as the same."""
        names = [self.text] if self.text else list(self.reader.content) or self.target.names
        return [name for name in names if name in self.target.names] or self.target.names


@dataclass
class Record:
    """Record of a finished unit."""

    shards: dict[str, list[Shard]] = field(default_factory=dict)
    tails: dict[str, bytes] = field(default_factory=dict)
    """Tokens that did not fill a block."""
    bad: list[Bad] = field(default_factory=list)
    duplicates: int = 0

    def to_json(self) -> dict[str, Any]:
        tails = {split: base64.b64encode(tail).decode() for split, tail in self.tails.items()}
        return {**asdict(self), "tails": tails, "bad": [list(bad) for bad in self.bad]}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Record:
        return cls(
            {
                split: [Shard(**{**shard, "parts": tuple(shard["parts"])}) for shard in shards]
                for split, shards in plain["shards"].items()
            },
            {split: base64.b64decode(tail) for split, tail in plain["tails"].items()},
            [Bad(*bad) for bad in plain["bad"]],
            plain["duplicates"],
        )


def write_unit(job: Job, unit: Unit, keep: NDArray[np.bool_] | None, say: Say) -> Record:
    """Write the unit's shards; `keep` masks its good rows. The caller saves the returned record."""
    record = Record()
    writers = {
        split: ShardWriter(
            join_url(job.options.dst, split) if split else job.options.dst, job.base + unit.number, job.options
        )
        for split in job.splits
    }
    samples, sides = _Samples(job), _Sides(job)
    done = 0
    for rows in cleaned(job, unit, record.bad, say):
        if keep is not None:
            mask = keep[done : done + rows.num_rows]
            done += rows.num_rows
            if done > len(keep):
                raise DataError(CHANGED)
            record.duplicates += int(len(mask) - mask.sum())
            rows = rows.filter(pa.array(mask))
        for split, part in sides.split(rows):
            writers[split].add(samples.make(split, part))
    record.shards = {split: writer.finish() for split, writer in writers.items()}
    record.tails = {split: packer.tail.tobytes() for split, packer in samples.packers.items()}
    return record


def digest_unit(job: Job, unit: Unit, say: Say) -> Digests:
    """Return the digest of each good row's content."""
    found = [row_digests(rows, job.content) for rows in cleaned(job, unit, [], say)]
    return np.concatenate([np.empty((0, 2), np.uint64), *found])


def cleaned(job: Job, unit: Unit, bad: list[Bad], say: Say) -> Iterator[pa.Table]:
    """Yield the unit's good rows, and add the others to `bad`; raise TooManyBadError above max_bad."""
    most, said = job.options.max_bad, 0
    for read in job.reader.read(unit.pieces, job.source):
        chunk: Chunk = clean(read, job.source, job.target, most)
        bad += [Bad(*map(without_secrets, one)) for one in chunk.bad]  # its place may be a URL that is signed
        refuse_bad(bad, most, job.options.dst)
        yield chunk.rows
        size = min(read.rows.nbytes, unit.size - said)
        said += size
        say(chunk.rows.num_rows, size)
    say(0, unit.size - said)


class TooManyBadError(DataError):
    """More records cannot be read than max_bad allows."""

    def __init__(self, message: str, bad: list[Bad]) -> None:
        super().__init__(message)
        self.bad = bad

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.bad)


def refuse_bad(bad: list[Bad], most: int, dst: str) -> None:
    """Raise TooManyBadError if there are more than `most`."""
    if len(bad) > most:
        first, where = bad[0], join_url(dst, "bad.jsonl")
        raise TooManyBadError(
            f"{first.place} {first.reason}: {len(bad)} bad so far, max_bad={most}; mend the source, "
            f"choose columns= or set max_bad= higher (all that were found: {where})",
            bad,
        )


CHANGED = "the source gave other rows at its second reading, which dedup=true needs; let it stay as it is meanwhile"


class _Sides:
    """Divides rows between the splits."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._seen = 0

    def split(self, rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
        """Yield each split and its rows."""
        job = self._job
        if job.splits == ("",):
            yield "", rows
            return
        if job.every:
            out = np.arange(self._seen + 1, self._seen + rows.num_rows + 1) % job.every == 0
            self._seen += rows.num_rows
        else:
            names = [job.options.key] if job.options.key else job.content
            out = held_out(row_digests(rows, names), job.options.validation)
        yield TRAIN, rows.filter(pa.array(~out))
        yield VALIDATION, rows.filter(pa.array(out))


class _Samples:
    """Makes samples of good rows: as they are, or of tokens."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.packers: dict[str, Packer] = {}
        name = job.options.tokenizer
        self._tokenizer = open_tokenizer(name, job.options.separator) if name else None
        if self._tokenizer and job.options.pack:
            kind, end = token_type(self._tokenizer.vocab), self._tokenizer.separator
            self.packers = {split: Packer(job.options.pack + 1, end, kind) for split in job.splits}

    def make(self, split: str, rows: pa.Table) -> pa.Table:
        """Return the samples of these rows; tokens that fill no block are kept for the next rows."""
        job = self._job
        if self._tokenizer is None or job.text is None:
            return rows.select(job.output.names)
        if not rows.num_rows:
            return job.output.empty_table()
        tokens = self._tokenizer.encode(rows.column(job.text).combine_chunks())
        if self.packers:
            return self.packers[split].add(tokens)
        columns = {name: rows.column(name) for name in job.output.names if name != TOKENS}
        return pa.table({**columns, TOKENS: ragged(tokens, token_type(self._tokenizer.vocab))}).select(job.output.names)

"""Trace of samples to steps and back, by data.json in the run folder, the order and its inverse."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.checked_json import mapping, parse, sequence, text, whole
from everstep.config import RunConfig, first_steps_without
from everstep.errors import ConfigError, DataError
from everstep.frozen_config import thaw
from everstep.run_folder import CONFIG, DATA, RunFolder, meant
from everstep.storage.base import LARGEST_READ
from everstep.trainer.checkpoint.manifest import Committed, candidates
from everstep.trainer.data.ordering.length_order import order_of
from everstep.trainer.data.ordering.order import OrderSource, SampleOrder

LONGEST_PLACE = 1 << 16
"""Characters of a path, URL or name of a shard."""
FLOAT_BYTES = 8


@dataclass(frozen=True)
class DataRecord:
    """One source of a run's samples."""

    place: str
    """Path or URL, or the class of the dataset."""
    digest: str
    share: str
    """Share of all samples that the run uses, as a fraction."""
    rows: Sequence[int]
    """Samples of each shard."""
    files: Sequence[str] = ()
    """Name of each shard, if there are files."""
    weights: str | None = None
    """Weight of each sample: float64, deflated, base64; None if each comes once per epoch."""
    lengths: str | None = None
    """Length of each sample, written in the same way; None if the order does not depend on it."""


def read_record(folder: RunFolder) -> list[DataRecord]:
    """Return the sources of a run.

    Raises:
        DataError: the run has not recorded them, or the record is damaged.
    """
    try:
        document = mapping(parse(folder.storage.read(DATA)), "it")
        return [_data_record(source) for source in sequence(document["sources"], "sources")]
    except FileNotFoundError:
        raise DataError(f"{folder.url} has no {DATA}: it is no run folder, or its run never began to train") from None
    except (ValueError, KeyError, TypeError, ArithmeticError, zlib.error) as error:
        raise DataError(f"{folder.url}/{DATA} is damaged ({error!r}); start the run again to write it anew") from error


def _data_record(source: object) -> DataRecord:
    """Return a source; ValueError or TypeError unless `write_record` can have written it."""
    found = DataRecord(**mapping(source, "a source"))
    for name in ("place", "digest"):
        text(getattr(found, name), name, LONGEST_PLACE)
    if not Fraction(text(found.share, "share")) > 0:
        raise ValueError(f"share is {found.share}, not above 0")
    rows = sum(whole(count, "rows") for count in sequence(found.rows, "rows"))
    for file in sequence(found.files, "files"):
        text(file, "files", LONGEST_PLACE)
    if found.files and len(found.files) != len(found.rows):
        raise ValueError(f"{len(found.files)} files have {len(found.rows)} numbers of rows")
    for name in ("weights", "lengths"):
        numbers = getattr(found, name)
        if numbers is not None and len(_inflated(numbers, rows)) != rows * FLOAT_BYTES:
            raise ValueError(f"the {name} are not those of {rows} samples")
    return found


def write_record(folder: RunFolder, sources: Sequence[DataRecord]) -> None:
    """Write the record of the sources, unless the same is already there."""
    document: dict[str, Any] = {"sources": [asdict(source) for source in sources]}
    text = (json.dumps(document) + "\n").encode()
    if not folder.storage.create(DATA, text) and folder.storage.read(DATA) != text:
        folder.storage.write(DATA, text)


def order_sources(records: Sequence[DataRecord]) -> list[OrderSource]:
    return [
        OrderSource(record.rows, Fraction(record.share), unpacked(record.weights), unpacked(record.lengths))
        for record in records
    ]


def packed(numbers: NDArray[np.float64] | None) -> str | None:
    return None if numbers is None else base64.b64encode(zlib.compress(numbers.tobytes(), 1)).decode()


def unpacked(text: str | None) -> NDArray[np.float64] | None:
    return None if text is None else np.frombuffer(zlib.decompress(base64.b64decode(text)))


def _inflated(packed: str, rows: int) -> bytes:
    """Return the bytes of packed numbers, at most one more than `rows` of them have."""
    return zlib.decompressobj().decompress(base64.b64decode(packed), min(rows * FLOAT_BYTES, LARGEST_READ) + 1)


class Places:
    """Conversion from a sample's id to source, shard and row, and back."""

    def __init__(self, records: Sequence[DataRecord], order: SampleOrder) -> None:
        self._records = records
        self._starts = order.starts
        self._shards = [np.cumsum([0, *record.rows]) for record in records]

    def of(self, sample: int) -> tuple[str, str, int]:
        """Return (source, shard or '', row) of a sample."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        record, local = self._records[number], sample - int(self._starts[number])
        if not record.files:
            return record.place, "", local
        shard = int(np.searchsorted(self._shards[number], local, side="right")) - 1
        return record.place, record.files[shard], local - int(self._shards[number][shard])

    def sample(self, file: str, row: int) -> int:
        """Return the id of row `row` of the shard `file`, which is a name or the end of a path.

        Raises:
            DataError: no shard or several match, or the row does not exist.
        """
        found = [
            (number, shard)
            for number, record in enumerate(self._records)
            for shard, name in enumerate(record.files)
            if file in (name, f"{record.place.rstrip('/')}/{name}")
        ]
        if len(found) != 1:
            raise DataError(f"{len(found)} shards of the run are called {file!r}; give a sample's id, or PATH/FILE:ROW")
        number, shard = found[0]
        rows = self._records[number].rows[shard]
        if not 0 <= row < rows:
            raise DataError(f"{file} has rows 0 to {rows - 1}, not {row}")
        return int(self._starts[number] + self._shards[number][shard] + row)


LOOKED_AT = 1 << 16
"""Positions of the order that are computed at once."""


@dataclass(frozen=True)
class Visit:
    """One sample at its position in one step."""

    sample: int
    step: int
    """As the log counts steps: the first is 1."""
    epoch: int
    """Epoch of the sample's own dataset, from 0."""
    place: int
    """Position in the global batch, from 0."""
    microbatch: int
    source: str
    shard: str
    row: int
    state: str
    """trained, to come, excluded, or passed over (by a rollback)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Trace:
    """The samples of a run by step, and its steps by sample."""

    def __init__(self, folder: RunFolder) -> None:
        try:
            run: RunConfig = thaw(folder.storage.read(CONFIG))
        except FileNotFoundError:
            raise ConfigError(f"{folder.url} is not a run folder: it has no {CONFIG}{meant(folder.url)}") from None
        records = read_record(folder)
        self.steps, self.micro_batch = run.steps, run.micro_batch
        sources = order_sources(records)
        self.order = order_of(run, sources)
        self.places = Places(records, self.order)
        manifest = next((found.manifest for found in candidates(folder) if isinstance(found, Committed)), None)
        self.reached = manifest.step if manifest is not None else 0
        """The step of the newest checkpoint."""
        self._passed_over = manifest.progress.get("passed_over", []) if manifest is not None else []
        self._excluded = first_steps_without(run.exclude)

    def step(self, number: int) -> list[Visit]:
        """Return the samples of a step, in the order of the batch."""
        if not 1 <= number <= self.steps:
            raise ConfigError(f"--step {number}: the run has steps 1 to {self.steps}")
        batch = self.order.global_batch
        epochs, ids = self.order.at((number - 1) * batch, np.arange(batch))
        pairs = zip(ids.tolist(), epochs.tolist(), strict=True)
        return [
            self._visit(sample, number, self._epoch(sample, turn), place) for place, (sample, turn) in enumerate(pairs)
        ]

    def visits(self, sample: int) -> Iterator[Visit]:
        """Yield every visit of a sample up to the run's last step."""
        if not 0 <= sample < self.order.samples:
            raise ConfigError(f"--sample {sample}: the run has samples 0 to {self.order.samples - 1}")
        if self.order.source_of(sample).weights is not None:
            yield from self._drawn(sample)
            return
        end, epoch = self.steps * self.order.global_batch, 0
        while (position := self.order.position_of(sample, epoch)) < end:
            step, place = divmod(position, self.order.global_batch)
            yield self._visit(sample, step + 1, epoch, place)
            epoch += 1

    def _drawn(self, sample: int) -> Iterator[Visit]:
        """Yield the visits of a sample that is drawn by weight; this needs a scan of every step."""
        batch = self.order.global_batch
        together = max(1, LOOKED_AT // batch)
        for first in range(0, self.steps, together):
            count = min(together, self.steps - first) * batch
            turns, ids = self.order.at(first * batch, np.arange(count))
            for offset in np.flatnonzero(ids == sample).tolist():
                step, place = divmod(offset, batch)
                yield self._visit(sample, first + step + 1, self._epoch(sample, int(turns[offset])), place)

    def _epoch(self, sample: int, turn: int) -> int:
        """Return the epoch of a turn of the order, which for a weighted source is a draw's number."""
        source = self.order.source_of(sample)
        return turn if source.weights is None else turn // sum(source.rows)

    def sample(self, text: str) -> int:
        """Return the id that `text` names: an id, or `FILE:ROW` of a shard."""
        if text.isdecimal():
            return int(text)
        file, _, row = text.rpartition(":")
        if not file or not row.isdecimal():
            raise ConfigError(f"--sample {text!r} is neither an id nor FILE:ROW, such as shard-000003-000.arrow:17")
        return self.places.sample(file, int(row))

    def _visit(self, sample: int, step: int, epoch: int, place: int) -> Visit:
        microbatch = place // self.micro_batch
        return Visit(sample, step, epoch, place, microbatch, *self.places.of(sample), self._state(sample, step))

    def _state(self, sample: int, step: int) -> str:
        if step >= self._excluded.get(sample, step + 1):
            return "excluded"
        if any(first <= step <= last for first, last in self._passed_over):
            return "passed over"
        return "trained" if step <= self.reached else "to come"

"""Trace of samples to steps and back, by the records in the run folder, the order and its inverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from everstep.config import RunConfig, first_steps_without
from everstep.errors import ConfigError, DataError
from everstep.frozen_config import attempt_config, thaw
from everstep.run_folder import CONFIG, RunFolder, meant
from everstep.trainer.checkpoint.manifest import Committed, Manifest, candidates
from everstep.trainer.data.ordering.data_record import DataRecord, order_sources, read_record
from everstep.trainer.data.ordering.length_order import order_of
from everstep.trainer.data.ordering.order import SampleOrder


class Places:
    """Conversion from a sample's id to source, shard and row, and back."""

    def __init__(self, records: Sequence[DataRecord], order: SampleOrder) -> None:
        self.records = records
        self._starts = order.starts
        self._shards = [np.cumsum([0, *record.rows]) for record in records]

    def of(self, sample: int) -> tuple[str, str, int]:
        """Return (source, shard or '', row) of a sample."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        record, local = self.records[number], sample - int(self._starts[number])
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
            for number, record in enumerate(self.records)
            for shard, name in enumerate(record.files)
            if file in (name, f"{record.place.rstrip('/')}/{name}")
        ]
        if len(found) != 1:
            raise DataError(f"{len(found)} shards of the run are called {file!r}; give a sample's id, or PATH/FILE:ROW")
        number, shard = found[0]
        rows = self.records[number].rows[shard]
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


@dataclass(frozen=True)
class Stretch:
    """Steps [first, last] of a run that have one order: those of an attempt that count, or those to come."""

    first: int
    last: int
    order: SampleOrder
    micro_batch: int


class Trace:
    """The samples of a run by step, and its steps by sample.

    A resume may change what the order depends on (`resume.allow=[seed]`): each step has the order of the attempt whose
    updates the run holds.
    """

    def __init__(self, folder: RunFolder) -> None:
        try:
            run = thaw(folder.storage.read(CONFIG))
        except FileNotFoundError:
            raise ConfigError(f"{folder.url} is not a run folder: it has no {CONFIG}{meant(folder.url)}") from None
        records = read_record(folder)
        self.steps = run.steps
        self._sources = order_sources(records)
        manifests = [found.manifest for found in candidates(folder) if isinstance(found, Committed)]
        self.reached = manifests[0].step if manifests else 0
        """The step of the newest checkpoint."""
        self._passed_over = manifests[0].progress.get("passed_over", []) if manifests else []
        self._excluded = first_steps_without(run.exclude)
        self._stretches = self._find_stretches(folder, run, manifests)
        self.order = self._stretches[-1].order
        self.places = Places(records, self.order)

    def _find_stretches(self, folder: RunFolder, run: RunConfig, manifests: Sequence[Manifest]) -> list[Stretch]:
        """Return the stretches of the run in turn; the steps to come have the order of the root config."""
        starts = folder.lineage().restored
        # Of a run that was short of memory the checkpoints say how large a microbatch really was.
        sizes = {each.attempt: each.progress["micro_batch"] for each in reversed(manifests)}
        newest = sizes[manifests[0].attempt] if manifests else 0
        found = [self._stretch(self.reached + 1, self.steps, run, newest)] if self.reached < self.steps else []
        last = self.reached
        for number in sorted(starts, reverse=True):
            if starts[number] < last:
                config = attempt_config(folder, number) or run
                found.append(self._stretch(starts[number] + 1, last, config, sizes.get(number, 0)))
                last = starts[number]
        return found[::-1]

    def _stretch(self, first: int, last: int, run: RunConfig, micro_batch: int) -> Stretch:
        order = order_of(run, self._sources)
        return Stretch(first, last, order, min(run.micro_batch, micro_batch or run.micro_batch))

    def step(self, number: int, microbatch: int | None = None) -> list[Visit]:
        """Return the samples of a step, or of one of its microbatches, in the order of the batch."""
        if not 1 <= number <= self.steps:
            raise ConfigError(f"--step {number}: the run has steps 1 to {self.steps}")
        at = next(stretch for stretch in self._stretches if number <= stretch.last)
        batch = at.order.global_batch
        microbatches = -(-batch // at.micro_batch)
        if microbatch is not None and not 0 <= microbatch < microbatches:
            raise ConfigError(f"--microbatch {microbatch}: step {number} has microbatches 0 to {microbatches - 1}")
        epochs, ids = at.order.at((number - 1) * batch, np.arange(batch))
        found = [
            self._visit(at, sample, number, self._epoch(sample, turn), place)
            for place, (sample, turn) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True))
        ]
        return [visit for visit in found if microbatch in (None, visit.microbatch)]

    def visits(self, sample: int) -> Iterator[Visit]:
        """Yield every visit of a sample up to the run's last step."""
        if not 0 <= sample < self.order.samples:
            raise ConfigError(f"--sample {sample}: the run has samples 0 to {self.order.samples - 1}")
        for stretch in self._stretches:
            drawn = stretch.order.source_of(sample).weights is not None
            yield from self._drawn(stretch, sample) if drawn else self._visited(stretch, sample)

    def _visited(self, stretch: Stretch, sample: int) -> Iterator[Visit]:
        """Yield the visits of a sample that each epoch of its source visits once."""
        batch, epoch = stretch.order.global_batch, 0
        while (position := stretch.order.position_of(sample, epoch)) < stretch.last * batch:
            step, place = divmod(position, batch)
            if step + 1 >= stretch.first:
                yield self._visit(stretch, sample, step + 1, epoch, place)
            epoch += 1

    def _drawn(self, stretch: Stretch, sample: int) -> Iterator[Visit]:
        """Yield the visits of a sample that is drawn by weight; this needs a scan of every step."""
        batch = stretch.order.global_batch
        together = max(1, LOOKED_AT // batch)
        for first in range(stretch.first - 1, stretch.last, together):
            count = min(together, stretch.last - first) * batch
            turns, ids = stretch.order.at(first * batch, np.arange(count))
            for offset in np.flatnonzero(ids == sample).tolist():
                step, place = divmod(offset, batch)
                yield self._visit(stretch, sample, first + step + 1, self._epoch(sample, int(turns[offset])), place)

    def _epoch(self, sample: int, turn: int) -> int:
        """Return the epoch of a turn of the order, which for a weighted source is a draw's number."""
        source = self.order.source_of(sample)
        return turn if source.weights is None else turn // sum(source.rows)

    def _visit(self, stretch: Stretch, sample: int, step: int, epoch: int, place: int) -> Visit:
        microbatch = place // stretch.micro_batch
        return Visit(sample, step, epoch, place, microbatch, *self.places.of(sample), self._state(sample, step))

    def _state(self, sample: int, step: int) -> str:
        if step >= self._excluded.get(sample, step + 1):
            return "excluded"
        if any(first <= step <= last for first, last in self._passed_over):
            return "passed over"
        return "trained" if step <= self.reached else "to come"

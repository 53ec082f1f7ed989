"""From the sample order to the tensors of a step: inline, by a thread, or by worker processes.

Which samples come in which order is the business of `SampleOrder`; how they are fetched changes nothing
in it, so `prefetch` and `workers` are free to differ from one start of a run to the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.dataset import Augment, Dataset
from trainer.data.order import Ids, SampleOrder, Slot, microbatches, sample_keys
from trainer.data.prefetch import Prefetcher
from trainer.data.workers import Workers
from trainer.errors import ConfigError, DataError

CHUNK = 1 << 14
"""Sample ids computed at a time: enough to make their cost vanish, few enough to stay in the cache."""


@dataclass(slots=True)
class Microbatch:
    """What one rank passes through the model at once."""

    index: int
    """Its number in the global batch."""
    real: bool
    """False: passed with weight zero, so that collectives match on ranks with nothing left to do."""
    ids: Ids
    batch: dict[str, Tensor]
    """Named columns on the rank's device; row i is sample `ids[i]`."""


class Request(NamedTuple):
    """The samples of one slot, and the epoch in which each is visited."""

    ids: Ids
    epochs: Ids


@dataclass(frozen=True)
class Gather:
    """Fetches and augments the samples of a request, on the CPU; what workers run."""

    dataset: Dataset
    augment: Augment | None
    seed: int

    def __call__(self, request: Request) -> dict[str, Tensor]:
        batch = self.dataset.take(request.ids)
        if self.augment is not None:
            batch = self.augment(batch, sample_keys(self.seed, request.epochs, request.ids))
        return batch


class Loader:
    """The microbatches of one rank, step after step, from any step on.

    `prefetch` steps are kept ready by a thread (0: each is gathered when asked for, the fastest way for
    small data in memory); `workers` processes gather in parallel where reading or augmenting is slow.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: SampleOrder,
        micro_batch: int,
        rank: int,
        world: int,
        device: torch.device | str,
        *,
        augment: Augment | None = None,
        prefetch: int = 2,
        workers: int = 0,
    ) -> None:
        if len(dataset) != order.samples:
            raise DataError(f"the order is of {order.samples} samples, the dataset has {len(dataset)}")
        for key, value in (("prefetch", prefetch), ("workers", workers)):
            if value < 0:
                raise ConfigError(f"loader.{key}={value} must be 0 or more")
        self.order = order
        self.slots = microbatches(order.global_batch, micro_batch, rank, world)
        self.device = torch.device(device)
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data so far."""
        self._gather = Gather(dataset, augment, order.seed)
        self._prefetch = prefetch
        self._workers = workers
        self._open: list[Prefetcher[list[Microbatch]] | Workers[Request, dict[str, Tensor]]] = []

    def steps(self, first_step: int) -> Iterator[list[Microbatch]]:
        """The local microbatches of step `first_step` and of every one after it, without end.

        One iterator at a time: a second call stops the thread or workers of the first.
        """
        self.close()
        source = self._steps(first_step)
        if self._prefetch and not self._workers:
            source = thread = Prefetcher(source, self._prefetch)
            self._open.append(thread)
        return self._timed(source)

    def close(self) -> None:
        """Stop the thread and the worker processes, if any."""
        while self._open:
            self._open.pop().close()

    def _timed(self, source: Iterator[list[Microbatch]]) -> Iterator[list[Microbatch]]:
        while True:
            start = time.perf_counter()
            try:
                step = next(source)
            except StopIteration:
                return
            if self.device.type != "cpu":
                for microbatch in step:
                    microbatch.batch = _moved(microbatch.batch, self.device)
            self.wait_s += time.perf_counter() - start
            yield step

    def _steps(self, first_step: int) -> Iterator[list[Microbatch]]:
        requests = self._requests(first_step)
        batches: Iterator[dict[str, Tensor]] | None = None
        if self._workers:
            ahead = max(1, self._prefetch) * len(self.slots)
            workers = Workers(self._gather, self._requests(first_step), self._workers, ahead)
            self._open.append(workers)
            batches = workers
        pin = self.device.type == "cuda"
        while True:
            step = []
            for slot in self.slots:
                request = next(requests)
                batch = self._gather(request) if batches is None else next(batches, None)
                if batch is None:  # closed
                    return
                step.append(Microbatch(slot.index, slot.real, request.ids, _pinned(batch) if pin else batch))
            yield step

    def _requests(self, first_step: int) -> Iterator[Request]:
        """The slots of each step in turn; only this rank's samples are computed, many steps at a time."""
        offsets = np.concatenate([np.arange(slot.start, slot.stop) for slot in self.slots])
        bounds = np.cumsum([0, *(slot.stop - slot.start for slot in self.slots)]).tolist()
        batch = self.order.global_batch
        count = max(1, CHUNK // len(offsets))
        steps = (np.arange(count) * batch)[:, None] + offsets
        position = first_step * batch
        while True:
            epochs, ids = self.order.at(position, steps)
            for row in range(count):
                for start, stop in pairwise(bounds):
                    yield Request(ids[row, start:stop], epochs[row, start:stop])
            position += count * batch


def evaluation_batches(
    dataset: Dataset, batch: int, rank: int, world: int, device: torch.device | str, limit: int | None = None
) -> Iterator[Microbatch]:
    """The first `limit` samples (all: None) in stored order, `batch` at a time; ranks take them in turn.

    Every rank gets equally many; one that has none left repeats the last with `real=False`.
    """
    samples = len(dataset) if limit is None else min(limit, len(dataset))
    if samples < 1:
        raise DataError("there is nothing to evaluate on: the validation set holds no sample")
    if batch < 1:
        raise ConfigError(f"evaluate.batch={batch} must be at least 1 sample")
    return _in_order(dataset, microbatches(samples, batch, rank, world), torch.device(device))


def _in_order(dataset: Dataset, slots: list[Slot], device: torch.device) -> Iterator[Microbatch]:
    for slot in slots:
        ids = np.arange(slot.start, slot.stop)
        columns = dataset.take(ids)
        if device.type != "cpu":
            columns = _moved(_pinned(columns) if device.type == "cuda" else columns, device)
        yield Microbatch(slot.index, slot.real, ids, columns)


def _pinned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.pin_memory() for name, column in batch.items()}


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}

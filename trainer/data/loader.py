"""From the sample order to the tensors of a step: inline, by a thread, or by worker processes.

Which samples come in which order is the business of `SampleOrder`; how they are fetched changes nothing
in it, so `prefetch` and `workers` are free to differ from one start of a run to the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from trainer.data.gather import Gather, Microbatch, Request
from trainer.data.lookahead import Lookahead
from trainer.data.order import SampleOrder, Slot, microbatches
from trainer.data.prefetch import Prefetcher
from trainer.data.workers import Workers
from trainer.errors import ConfigError, DataError

LOG = logging.getLogger("everstep")
CHUNK = 1 << 13
"""Sample ids computed at a time: enough to make their cost vanish, few enough to stay in the cache."""
FIRST_CHUNK = 1 << 10
"""The same at the start of an iteration, whose first batch somebody waits for."""
GROUP, GROUP_BYTES = 384, 2 << 20
"""Samples, and bytes of them, that are gathered at a time from a dataset that is best at many."""


class Loader:
    """The microbatches of one rank, step after step, from any step on.

    `prefetch` steps are kept ready by a thread (0: each is gathered when asked for, the fastest way for
    small data in memory); `workers` processes gather in parallel where reading or augmenting is slow.
    """

    def __init__(
        self,
        gather: Gather,
        order: SampleOrder,
        micro_batch: int,
        rank: int,
        world: int,
        device: torch.device | str,
        *,
        prefetch: int = 2,
        workers: int = 0,
        ahead_mb: int = 256,
    ) -> None:
        if len(gather.dataset) != order.samples:
            raise DataError(f"the order is of {order.samples} samples, the dataset has {len(gather.dataset)}")
        for key, value in (("prefetch", prefetch), ("workers", workers), ("ahead_mb", ahead_mb)):
            if value < 0:
                raise ConfigError(f"loader.{key}={value} must be 0 or more")
        self.order = order
        self.slots = microbatches(order.global_batch, micro_batch, rank, world)
        self.device = torch.device(device)
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data so far."""
        self._gather = gather
        self._prefetch = prefetch
        self._workers = workers
        self._ahead_mb = ahead_mb
        self._open: list[Prefetcher[list[Microbatch]] | Workers[Request, Microbatch] | Lookahead] = []

    def steps(self, first_step: int) -> Iterator[list[Microbatch]]:
        """The local microbatches of step `first_step` and of every one after it, without end.

        One iterator at a time: a second call stops the threads or workers of the first.
        """
        self.close()
        gathered = self._gathered(first_step)
        lookahead = self._look_ahead(first_step)
        source = self._steps(gathered)
        if self._prefetch and not self._workers:
            source = thread = Prefetcher(source, self._prefetch)
            self._open.append(thread)
        return self._timed(source, lookahead)

    def close(self) -> None:
        """Stop the threads and the worker processes, if any."""
        while self._open:
            self._open.pop().close()

    def _timed(self, source: Iterator[list[Microbatch]], lookahead: Lookahead | None) -> Iterator[list[Microbatch]]:
        used = sum(slot.stop - slot.start for slot in self.slots)
        while True:
            start = time.perf_counter()
            try:
                step = next(source)
            except StopIteration:
                return
            if self.device.type != "cpu":
                for microbatch in step:
                    microbatch.batch = _moved(microbatch.batch, self.device)
            if lookahead is not None:
                lookahead.used(used)
            self.wait_s += time.perf_counter() - start
            yield step

    def _steps(self, gathered: Iterator[Microbatch]) -> Iterator[list[Microbatch]]:
        pin = self.device.type == "cuda"
        while True:
            step = []
            for _ in self.slots:
                microbatch = next(gathered, None)
                if microbatch is None:  # closed
                    return
                for sample in microbatch.skipped:
                    LOG.warning("left out, since it cannot be decoded: %s", sample)
                if pin:
                    microbatch.batch = _pinned(microbatch.batch)
                step.append(microbatch)
            yield step

    def _gathered(self, first_step: int) -> Iterator[Microbatch]:
        """The local slots in turn: by workers, or here, as many at a time as make one good gather."""
        requests = self._requests(first_step)
        if self._workers:
            ahead = max(1, self._prefetch) * len(self.slots)
            workers = Workers(self._gather, requests, self._workers, ahead)
            self._open.append(workers)
            return workers
        dataset = self._gather.dataset
        if not getattr(dataset, "bulk", False):
            return map(self._gather, requests)
        fitting = min(GROUP, int(GROUP_BYTES / max(1.0, getattr(dataset, "sample_bytes", 1.0))))
        largest = max(slot.stop - slot.start for slot in self.slots)
        return self._grouped(requests, fitting // largest) if fitting >= 2 * largest else map(self._gather, requests)

    def _grouped(self, requests: Iterator[Request], count: int) -> Iterator[Microbatch]:
        while True:
            yield from self._gather.together(list(islice(requests, count)))

    def _look_ahead(self, first_step: int) -> Lookahead | None:
        dataset = self._gather.dataset
        want, room = getattr(dataset, "want", None), getattr(dataset, "room_bytes", None)
        if want is None or room is None or not self._ahead_mb:
            return None
        # What is fetched ahead must not push out of the cache what is needed before it.
        ahead_bytes = min(self._ahead_mb * 1e6, room / 2)
        ahead = 1 + int(ahead_bytes / max(1.0, getattr(dataset, "sample_bytes", 1.0)))
        ids = (np.concatenate([request.ids for request in several]) for several in self._chunks(first_step, ahead))
        lookahead = Lookahead(want, ids, ahead)
        self._open.append(lookahead)
        return lookahead

    def _chunks(self, first_step: int, ahead: int) -> Iterator[list[Request]]:
        requests = self._requests(first_step)
        while True:
            yield list(islice(requests, max(1, ahead // 16 // max(1, self.slots[0].stop - self.slots[0].start))))

    def _requests(self, first_step: int) -> Iterator[Request]:
        """The slots of each step in turn; only this rank's samples are computed, many steps at a time."""
        offsets = np.concatenate([np.arange(slot.start, slot.stop) for slot in self.slots])
        bounds = np.cumsum([0, *(slot.stop - slot.start for slot in self.slots)]).tolist()
        cuts = [(*cut, slot.index, slot.real) for cut, slot in zip(pairwise(bounds), self.slots, strict=True)]
        batch = self.order.global_batch
        count = FIRST_CHUNK
        step = first_step
        while True:
            count = max(1, min(count, CHUNK) // len(offsets))
            steps = (np.arange(count) * batch)[:, None] + offsets
            epochs, ids = self.order.at(step * batch, steps)
            for row in range(count):
                for start, stop, index, real in cuts:
                    yield Request(ids[row, start:stop], epochs[row, start:stop], step + row + 1, index, real)
            step += count
            count = CHUNK


def evaluation_batches(
    gather: Gather, batch: int, rank: int, world: int, device: torch.device | str, limit: int | None = None
) -> Iterator[Microbatch]:
    """The first `limit` samples (all: None) in stored order, `batch` at a time; ranks take them in turn.

    Every rank gets equally many; one that has none left repeats the last with `real=False`.
    """
    samples = len(gather.dataset) if limit is None else min(limit, len(gather.dataset))
    if samples < 1:
        raise DataError("there is nothing to evaluate on: the validation set holds no sample")
    if batch < 1:
        raise ConfigError(f"evaluate.batch={batch} must be at least 1 sample")
    return _in_order(gather, microbatches(samples, batch, rank, world), torch.device(device))


def _in_order(gather: Gather, slots: list[Slot], device: torch.device) -> Iterator[Microbatch]:
    for slot in slots:
        ids = np.arange(slot.start, slot.stop)
        microbatch = gather(Request(ids, np.zeros_like(ids), 0, slot.index, slot.real))
        if device.type == "cuda":
            microbatch.batch = _pinned(microbatch.batch)
        if device.type != "cpu":
            microbatch.batch = _moved(microbatch.batch, device)
        yield microbatch


def _pinned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.pin_memory() for name, column in batch.items()}


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}

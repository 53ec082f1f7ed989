"""Loader: from the sample order to the tensors of a step, inline, by a thread, or by worker processes.

`SampleOrder` alone determines which samples come in which order; how they are fetched changes nothing in it, so
`prefetch` and `workers` may differ from one attempt to the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, repeat
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from everstep.config import BadSample, LoaderConfig, Worker
from everstep.errors import ConfigError, DataError
from everstep.rank_env import RankInfo
from everstep.trainer.data.dataset import BatchedReads, Dataset, Prefetchable, mean_sample_bytes
from everstep.trainer.data.fetcher import Cut, Fetcher, Microbatch, MicrobatchRequest, RequestSpan
from everstep.trainer.data.ordering.order import Ids, MicrobatchSlot, SampleOrder, microbatches
from everstep.trainer.data.workers import Lookahead, Prefetch, Prefetcher, Threads, Workers

LOG = logging.getLogger("everstep")
CHUNK = 1 << 13
"""Sample ids computed at a time: enough to amortise the cost, few enough to stay in the cache."""
FIRST_CHUNK = 1 << 10
"""Sample ids in the first chunk, which is small since the step waits for its first batch."""
GROUP, GROUP_BYTES = 1024, 2200 << 10
"""Samples, and bytes of them, that are requested at a time from a dataset with `BatchedReads`."""


class Closable(Protocol):
    """Threads or processes that work for a loader."""

    def close(self) -> None: ...


class Loader:
    """The microbatches of one rank, step after step, from any step on.

    `prefetch` steps are kept ready by a thread (0: each is gathered when requested, the fastest way for small data in
    memory); `workers` processes or threads gather in parallel if reading or augmenting is slow. Generators belong to
    the process, so code that may draw from them never runs in a thread beside the step: it runs between steps or, with
    `workers`, in processes.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        order: SampleOrder,
        micro_batch: int,
        place: RankInfo,
        device: torch.device | str,
        config: LoaderConfig | None = None,
    ) -> None:
        if len(fetcher.dataset) != order.samples:
            raise DataError(f"the order is of {order.samples} samples, the dataset has {len(fetcher.dataset)}")
        self.fetcher = fetcher
        self.order = order
        self.micro_batch = micro_batch
        """Samples that this rank passes through the model at once, from the next call of `steps` on."""
        self.slots = microbatches(order.global_batch, micro_batch, place.rank, place.world)
        self.device = torch.device(device)
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data so far."""
        self._place = place
        self._config = config or LoaderConfig()
        self._open: list[Closable] = []

    def steps(self, first_step: int) -> Iterator[list[Microbatch]]:
        """Yield the local microbatches of step `first_step` and of every later one, without end.

        Only one iterator is active: a second call stops the threads or workers of the first.
        """
        self.close()
        self.slots = microbatches(self.order.global_batch, self.micro_batch, self._place.rank, self._place.world)
        fetched = self._fetched(first_step)
        lookahead = self._look_ahead(first_step)
        source = self._steps(fetched)
        if self._config.prefetch and not self._config.workers and not self.fetcher.draws:
            source = thread = Prefetcher(source, self._config.prefetch)
            self._open.append(thread)
        return self._timed(source, lookahead)

    def close(self) -> None:
        """Stop the threads and the worker processes, if any."""
        while self._open:
            self._open.pop().close()

    def _timed(self, source: Iterator[list[Microbatch]], lookahead: Lookahead | None) -> Iterator[list[Microbatch]]:
        used, move = sum(slot.stop - slot.start for slot in self.slots), self.device.type != "cpu"
        while True:
            start = time.perf_counter()
            try:
                step = next(source)
            except StopIteration:
                return
            if move:
                for microbatch in step:
                    microbatch.batch = _moved(microbatch.batch, self.device)
            if lookahead is not None:
                lookahead.used(used)
            self.wait_s += time.perf_counter() - start
            yield step

    def _steps(self, fetched: Iterator[Microbatch]) -> Iterator[list[Microbatch]]:
        count, pin, tell = len(self.slots), self.device.type == "cuda", self.fetcher.on_bad is BadSample.skip
        while len(step := list(islice(fetched, count))) == count:  # fewer: the loader was closed
            if tell:
                for sample in (sample for microbatch in step for sample in microbatch.skipped):
                    LOG.warning("left out, since it cannot be decoded: %s", sample)
            if pin:
                for microbatch in step:
                    microbatch.batch = _pinned(microbatch.batch)
            yield step

    def _fetched(self, first_step: int) -> Iterator[Microbatch]:
        """Yield the local slots in turn: by workers, or in this process, several at a time if that is faster."""
        dataset, config = self.fetcher.dataset, self._config
        if config.workers:
            ahead = max(1, config.prefetch) * len(self.slots)
            kind = Workers if config.worker is Worker.process or self.fetcher.draws else Threads
            workers = kind(self.fetcher, self._requests(first_step), config.workers, ahead)
            self._open.append(workers)
            return workers
        if isinstance(dataset, BatchedReads):
            fitting = min(GROUP, int(GROUP_BYTES / max(1.0, mean_sample_bytes(dataset))))
            steps = fitting // sum(slot.stop - slot.start for slot in self.slots)
            if steps * len(self.slots) > 1:
                spans = self._spans(first_step, steps)
                return chain.from_iterable(map(partial(self.fetcher.together, dataset), spans))
        return map(self.fetcher, self._requests(first_step))

    def _requests(self, first_step: int) -> Iterator[MicrobatchRequest]:
        return chain.from_iterable(span.requests() for span in self._spans(first_step, 1))

    def _look_ahead(self, first_step: int) -> Lookahead | None:
        downloads = _downloads(self.fetcher.dataset, self._config.ahead_mb)
        if downloads is None:
            return None
        prefetch, ahead = downloads
        spans = self._spans(first_step, 1 + ahead // 16 // sum(slot.stop - slot.start for slot in self.slots))
        lookahead = Lookahead(prefetch, (span.ids for span in spans), ahead)
        self._open.append(lookahead)
        return lookahead

    def _spans(self, first_step: int, steps: int) -> Iterator[RequestSpan]:
        """Yield spans of `steps` steps; only this rank's samples are computed, of many steps at once."""
        offsets = np.concatenate([np.arange(slot.start, slot.stop) for slot in self.slots])
        sizes = [slot.stop - slot.start for slot in self.slots] * steps
        bounds, slots = np.cumsum([0, *sizes]).tolist(), self.slots * steps
        cuts = [Cut(turn // len(self.slots), slot.index, slot.real) for turn, slot in enumerate(slots)]
        batch, width, step = self.order.global_batch, steps * len(offsets), first_step
        for chunk in chain([FIRST_CHUNK], repeat(CHUNK)):
            count = max(1, chunk // width) * steps
            epochs, ids = self.order.at(step * batch, ((np.arange(count) * batch)[:, None] + offsets).reshape(-1))
            for start in range(0, count * len(offsets), width):
                done = step + start // len(offsets)
                yield RequestSpan(done + 1, ids[start : start + width], epochs[start : start + width], bounds, cuts)
            step += count


def _downloads(dataset: Dataset, ahead_mb: int) -> tuple[Prefetch, int] | None:
    """Return the dataset's `prefetch` and the samples to look ahead; None if nothing must be downloaded."""
    if not ahead_mb or not isinstance(dataset, Prefetchable) or dataset.cache_bytes is None:
        return None
    # Samples downloaded ahead must not evict from the cache those that are needed earlier.
    ahead_bytes = min(ahead_mb * 1e6, dataset.cache_bytes / 2)
    # Beyond one epoch there is nothing new: of tiny samples a large cache would be asked for millions.
    return dataset.prefetch, 1 + min(len(dataset), int(ahead_bytes / max(1.0, mean_sample_bytes(dataset))))


def evaluation_batches(
    fetcher: Fetcher,
    batch: int,
    place: RankInfo,
    device: torch.device | str,
    limit: int | None = None,
    ahead_mb: int = 256,
    ids: Ids | None = None,
    step: int = 0,
) -> Iterator[Microbatch]:
    """Yield the first `limit` samples (None: all) in stored order, `batch` at a time; ranks take turns.

    Every rank gets equally many batches; a rank that has none left repeats the last with `real=False`.

    Args:
        ids: samples to yield, in this order; None for all.
        step: samples that are excluded from this step on, or earlier, are left out.
    """
    chosen = np.arange(len(fetcher.dataset)) if ids is None else ids
    chosen = chosen if limit is None else chosen[:limit]
    samples = len(chosen)
    if samples < 1:
        raise DataError("there is nothing to evaluate on: the validation set holds no sample")
    if batch < 1:
        raise ConfigError(f"evaluate.batch={batch} must be at least 1 sample")
    slots = microbatches(samples, batch, place.rank, place.world)
    batches = _in_order(fetcher, slots, torch.device(device), chosen, step)
    downloads = _downloads(fetcher.dataset, ahead_mb)
    return batches if downloads is None else _with_lookahead(batches, slots, chosen, *downloads)


def _with_lookahead(
    batches: Iterator[Microbatch], slots: list[MicrobatchSlot], chosen: Ids, prefetch: Prefetch, ahead: int
) -> Iterator[Microbatch]:
    lookahead = Lookahead(prefetch, (chosen[slot.start : slot.stop] for slot in slots), ahead)
    try:
        for microbatch in batches:
            lookahead.used(len(microbatch.ids))
            yield microbatch
    finally:
        lookahead.close()


def _in_order(
    fetcher: Fetcher, slots: list[MicrobatchSlot], device: torch.device, chosen: Ids, step: int
) -> Iterator[Microbatch]:
    ranges = [(chosen[slot.start : slot.stop], slot) for slot in slots]
    requests = [MicrobatchRequest(ids, np.zeros_like(ids), step, slot.index, slot.real) for ids, slot in ranges]
    for microbatch in fetcher.each(requests):
        if device.type == "cuda":
            microbatch.batch = _pinned(microbatch.batch)
        if device.type != "cpu":
            microbatch.batch = _moved(microbatch.batch, device)
        yield microbatch


def _pinned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.pin_memory() for name, column in batch.items()}


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}

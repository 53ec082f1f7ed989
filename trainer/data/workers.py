"""Threads and processes beside the step: microbatches in order, and downloads ahead of need."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from everstep.errors import EverstepError
from everstep.rank_env import PR_SET_PDEATHSIG
from everstep.trainer.data.ordering.order import Ids

Request = TypeVar("Request")
Result = TypeVar("Result")

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
Prefetch = Callable[[Ids], Sequence[Future[None]]]
ASKS = 3
"""Requests for the same ids.

First the ends of a shard, which tell the location of its columns; then the rest of a shard that cannot be mapped as it
is; then the parts that hold the samples.
"""


class Workers(Generic[Request, Result]):
    """Maps `work` over an endless iterator of requests in `count` processes; results keep the order.

    The signals that ask the trainer to save and stop reach its whole process group. The workers ignore them, since they
    must deliver until the trainer is done; they end with their parent.
    """

    def __init__(self, work: Callable[[Request], Result], requests: Iterable[Request], count: int, ahead: int) -> None:
        loader: DataLoader[Any] = DataLoader(
            _Work(work),
            batch_size=None,
            sampler=_Requests(requests),
            num_workers=count,
            prefetch_factor=max(2, -(-ahead // count)),
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise it would draw a seed from the step's own generator
        )
        # Until a worker has set its handlers, the mask that it inherits blocks the signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._results: Iterator[Result] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._processes = list(getattr(self._results, "_workers", ()))

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._results is None:
            raise StopIteration
        result = next(self._results)
        if isinstance(result, _Failed):
            raise result.error
        return result

    def close(self) -> None:
        """Stop the workers; one that does not stop within torch's 5 s is killed."""
        self._results = None
        for process in self._processes:
            if process.is_alive():
                process.kill()


@dataclass(frozen=True)
class _Failed:
    error: EverstepError


class _Work(TorchDataset[Any]):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._work(request)
        except EverstepError as error:
            return _Failed(error)  # torch would wrap its one-line message in a traceback


class _Requests(Sampler[Any]):
    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests)


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Iterates over `source` in a daemon thread that keeps up to `depth` items ready.

    An error in the source is raised in the consumer, after the items before it, with its own traceback. The consumer
    waits for an item on a lock, which signal handlers can interrupt.
    """

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self._source = source
        self._depth = max(1, depth)
        self._ready: deque[Item] = deque()
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._finished = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="everstep-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._change:
            while not (self._ready or self._finished or self._closed):
                self._change.wait()
            if self._ready and not self._closed:
                item = self._ready.popleft()
                self._change.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self, timeout: float = 5.0) -> None:
        """Stop the thread; wait for it at most `timeout` seconds if the source does not return."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
        except BaseException as error:
            self._error = error
        finally:
            with self._change:
                self._finished = True
                self._change.notify_all()

    def _put(self, item: Item) -> bool:
        with self._change:
            while len(self._ready) >= self._depth and not self._closed:
                self._change.wait()
            if not self._closed:
                self._ready.append(item)
                self._change.notify_all()
            return not self._closed


class Threads(Generic[Request, Result]):
    """Maps `work` over endless requests in `count` threads, up to `ahead` at a time, in order."""

    def __init__(self, work: Callable[[Request], Result], requests: Iterator[Request], count: int, ahead: int) -> None:
        self._work = work
        self._requests = requests
        self._ahead = max(count, ahead)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="everstep-worker")
        self._results: deque[Future[Result]] = deque()
        self._closed = False

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._closed:
            raise StopIteration
        for request in islice(self._requests, self._ahead - len(self._results)):
            self._results.append(self._pool.submit(self._work, request))
        return self._results.popleft().result()

    def close(self) -> None:
        """Accept no more work; requests that have begun end by themselves."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._results.clear()


@dataclass
class _Begun:
    """Samples with pending downloads."""

    ids: Ids
    futures: Sequence[Future[None]]
    asks: int = 1

    def done(self) -> bool:
        return all(future.done() for future in self.futures)

    def wait(self) -> None:
        """Wait until all downloads are done; raise EverstepError if one failed."""
        for future in self.futures:
            with contextlib.suppress(CancelledError):  # a shard was closed; it is opened again when it is needed
                future.result()


class Lookahead:
    """Calls `prefetch` with ids in the order of use, at most about `ahead` samples before they are used.

    `prefetch` begins downloads and does not wait. It is called again for the same samples when these are done, since
    only then may it know what else they need; meanwhile it is called for later samples.
    """

    def __init__(self, prefetch: Prefetch, ids: Iterator[Ids], ahead: int) -> None:
        self._prefetch = prefetch
        self._ids = ids
        self._ahead = ahead
        self._used = 0
        self._wake_at = 0  # count of used samples at which the thread has a request to make
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="everstep-lookahead", daemon=True)
        self._thread.start()

    def used(self, samples: int) -> None:
        """Count this many more samples as used."""
        self._used += samples
        if self._used >= self._wake_at:  # read without the lock, since most batches change nothing
            with self._change:
                self._change.notify_all()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        asked = 0
        begun: deque[_Begun] = deque()
        try:
            for ids in self._ids:
                asked += len(ids)
                if futures := self._prefetch(ids):
                    begun.append(_Begun(ids, futures))
                while begun and not self._closed and (begun[0].done() or self._is_far(asked)):
                    self._go_on(begun)
                with self._change:
                    self._wake_at = 1 + asked - self._ahead
                    while self._is_far(asked) and not self._closed:
                        self._change.wait()
                if self._closed:
                    return
            while begun and not self._closed:
                self._go_on(begun)
        except EverstepError:
            return  # the reader of the sample meets the same fault at its position in the order, and reports it

    def _is_far(self, asked: int) -> bool:
        return asked - self._used >= self._ahead

    def _go_on(self, begun: deque[_Begun]) -> None:
        """Wait for the first downloads, then begin those that the same samples still need."""
        first = begun[0]
        first.wait()
        first.asks += 1
        first.futures = self._prefetch(first.ids) if first.asks <= ASKS else ()
        if not first.futures:
            begun.popleft()

"""Threads that fetch microbatches, in order, for work that mostly waits or releases Python's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


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

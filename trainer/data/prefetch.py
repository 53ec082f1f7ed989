"""Prefetch thread that runs ahead of its consumer by a bounded number of items."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

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

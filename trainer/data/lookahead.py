"""Lookahead thread: makes a dataset download the samples that the run needs next, up to a limit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass

from everstep.errors import EverstepError
from everstep.trainer.data.ordering.order import Ids

Prefetch = Callable[[Ids], Sequence[Future[None]]]
ASKS = 3
"""Requests for the same ids.

First the ends of a shard, which tell the location of its columns; then the rest of a shard that cannot be mapped as it
is; then the parts that hold the samples.
"""


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
            with suppress(CancelledError):  # a shard was closed; it is opened again when it is needed
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

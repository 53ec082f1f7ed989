"""A thread that asks a dataset to fetch what the run will need next, so far ahead and no further."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future

from trainer.data.order import Ids
from trainer.errors import EverstepError

Want = Callable[[Ids], Sequence[Future[None]]]


class Lookahead:
    """Calls `want` with ids in the order of use, at most about `ahead` samples before they are used."""

    def __init__(self, want: Want, ids: Iterator[Ids], ahead: int) -> None:
        self._want = want
        self._ids = ids
        self._ahead = ahead
        self._used = 0
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="everstep-lookahead", daemon=True)
        self._thread.start()

    def used(self, samples: int) -> None:
        """So many more samples have been used."""
        with self._change:
            self._used += samples
            self._change.notify_all()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        asked = 0
        pending: deque[Future[None]] = deque()
        for ids in self._ids:
            try:
                pending += self._want(ids)
                # Few are outstanding at a time, so that what is needed first is not at the end of a long queue.
                while len(pending) > 2 * len(ids) and not self._closed:
                    pending.popleft().exception()
            except (EverstepError, CancelledError):
                return  # whoever uses the sample meets the same fault at its place in the order, and tells it
            asked += len(ids)
            with self._change:
                while asked - self._used >= self._ahead and not self._closed:
                    self._change.wait()
                if self._closed:
                    return

"""Sinks on threads of their own, so that training waits neither for a tracker's network nor for its start."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from everstep.trainer.reporting.sinks import Guarded, Record, Sink, warn

LOG = logging.getLogger("everstep")
MOST_WAITING = 10_000
"""Records that wait for a tracker; what comes beyond is left out, and counted."""
CLOSE_S = 40.0
"""Seconds that the end of a run waits for a tracker: W&B itself takes up to 30."""


class SinkThread:
    """A sink that its own thread opens, feeds and closes.

    Args:
        opener: makes the sink. If it fails, the sink is left out with a warning.
        earlier: returns the records of earlier attempts, for a sink that takes each step once (`once`): a kill may
            have left some of them unwritten.
    """

    def __init__(
        self, name: str, opener: Callable[[], Sink], earlier: Callable[[], Iterable[Record]] = tuple
    ) -> None:
        self.name = name
        self._opener = opener
        self._earlier = earlier
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._closed = self._off = False
        self._left_out = 0
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        with self._changed:
            if self._off:
                return
            if len(self._waiting) >= MOST_WAITING:
                self._left_out += 1
                first = self._left_out == 1
            else:
                self._waiting.append(record)
                self._changed.notify()
                return
        if first:
            warn(f"{self.name} is {MOST_WAITING} records behind; training goes on, and what follows is left out there")

    def close(self) -> None:
        """Wait up to CLOSE_S for what is left; a tracker that hangs does not hold up the end of the run."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        left = len(self._waiting) + self._left_out
        if self._thread.is_alive():
            warn(
                f"{self.name} has not ended within {CLOSE_S:.0f} s, and {left} records have not reached it; "
                "everstep sync RUN brings them"
            )
        elif left:
            warn(f"{self.name} lacks {left} records; everstep sync RUN brings them")

    def _run(self) -> None:
        sink = self._open()
        if sink is None:
            return
        while (record := self._next()) is not None:
            sink.log(record)
        sink.close()

    def _open(self) -> Guarded | None:
        try:
            opened = self._opener()
        except Exception as error:
            with self._changed:
                self._off = True
                self._waiting.clear()
            warn(f"{self.name} cannot be used, training goes on without: {type(error).__name__}: {error}")
            return None
        sink = Guarded(self.name, opened)
        if getattr(opened, "once", False):
            for record in self._earlier():
                sink.log(record)
        return sink

    def _next(self) -> Record | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None


"""Sinks on threads of their own, so that training never waits for a tracker."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from everstep.errors import ConfigError
from everstep.trainer.reporting.media_record import Media
from everstep.trainer.reporting.sinks import AGAIN_S, Guarded, Record, Sink, warn

LOG = logging.getLogger("everstep")
MOST_WAITING = 10_000
"""Records that wait for a tracker; what comes beyond is left out, and counted."""
LARGEST_MEDIA = 64 << 20
"""Bytes of pictures and texts that wait for a tracker."""
CLOSE_S = 40.0
"""Seconds that the end of a run waits for a tracker: W&B itself takes up to 30."""


class SinkThread:
    """A sink that its own thread opens, feeds and closes.

    Args:
        opener: makes the sink. If it fails, it is tried again later, and the sink is left out with a warning.
        earlier: returns the records of earlier attempts, for a sink that takes each step once (`once`): a kill may
            have left some of them unwritten.
    """

    def __init__(self, name: str, opener: Callable[[], Sink], earlier: Callable[[], Iterable[Record]] = tuple) -> None:
        self.name = name
        self._opener = opener
        self._earlier = earlier
        self._waiting: deque[Record | Media] = deque()
        self._media_bytes = 0
        self._changed = threading.Condition()
        self._closed = self._off = False
        self._left_out = 0
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        self._put(record, 0)

    def media(self, media: Media) -> None:
        """Pass on a text, picture, table or histogram, if the sink shows such."""
        self._put(media, media.size)

    def _put(self, record: Record | Media, media_bytes: int) -> None:
        with self._changed:
            if self._off:
                return
            if len(self._waiting) >= MOST_WAITING or self._media_bytes + media_bytes > LARGEST_MEDIA:
                self._left_out += 1
                first = self._left_out == 1
            else:
                self._waiting.append(record)
                self._media_bytes += media_bytes
                self._changed.notify()
                return
        if first:
            behind = len(self._waiting)
            warn(f"{self.name} is {behind} records behind; training goes on, and what follows is left out there")

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
            if isinstance(record, Media):
                sink.media(record.shown())
            else:
                sink.log(record)
        sink.close()

    def _open(self) -> Guarded | None:
        if (opened := self._opened()) is None:
            return None
        sink = Guarded(self.name, opened)
        if getattr(opened, "once", False):
            for record in self._earlier():
                sink.log(record)
        return sink

    def _opened(self) -> Sink | None:
        """Return what the opener makes, tried again every AGAIN_S and once more at the end of the run."""
        warned = False
        while True:
            last = self._closed
            try:
                return self._opener()
            except Exception as error:
                if not warned:
                    warn(f"{self.name} cannot be opened, training goes on without it: {type(error).__name__}: {error}")
                warned = True
                if isinstance(error, ConfigError) or last:
                    self._give_up()
                    return None
            with self._changed:
                self._changed.wait_for(lambda: self._closed, AGAIN_S)

    def _give_up(self) -> None:
        with self._changed:
            self._off = True
            self._left_out += len(self._waiting)
            self._waiting.clear()

    def _next(self) -> Record | Media | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            record = self._waiting.popleft() if self._waiting else None
            if isinstance(record, Media):
                self._media_bytes -= record.size
            return record

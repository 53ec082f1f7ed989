"""Timing of an attempt's start, from the beginning of the process to the end of its first step."""

from __future__ import annotations

import time


class StartupTimer:
    """A stopwatch with named laps; times of the same name are added."""

    def __init__(self, since: float) -> None:
        """Start the stopwatch at `since`, a value of time.monotonic()."""
        self.seconds: dict[str, float] = {}
        self._since = since

    def end(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._since, 3)
        self._since = now

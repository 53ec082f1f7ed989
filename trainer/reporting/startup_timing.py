"""Where the seconds of a start went, from the beginning of the process to the end of its first step."""

from __future__ import annotations

import time


class Laps:
    """A stopwatch whose laps have names; one that comes up again is added to."""

    def __init__(self, since: float) -> None:
        """`since` is of time.monotonic()."""
        self.seconds: dict[str, float] = {}
        self._since = since

    def end(self, name: str) -> None:
        """What has passed since the last lap was `name`."""
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._since, 3)
        self._since = now

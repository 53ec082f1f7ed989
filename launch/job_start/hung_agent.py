"""Detection of an agent or fork server that hangs after its workers have ended."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_S = 5.0
"""Seconds between two checks for workers of an agent."""


class HungAgent:
    """Check for a hung agent: it has had workers, and has had none for longer than the limit.

    Args:
        workers: returns the PIDs of its workers that have not ended.
    """

    def __init__(self, workers: Callable[[], list[int]], limit_s: float) -> None:
        self.workers = workers
        self.limit_s = limit_s
        self._last_seen = float("inf")
        self._polled = float("-inf")

    def is_hung(self) -> bool:
        now = time.monotonic()
        if now - self._polled >= POLL_S and self.limit_s != float("inf"):
            self._polled = now
            if self.workers():
                self._last_seen = now
        return now - self._last_seen > self.limit_s

"""Process tree of this machine, from /proc."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

LOOK_S = 5.0
"""Seconds between two checks for workers of an agent."""


def descendants(pid: int) -> list[int]:
    tree = children()
    found, todo = [], [pid]
    while todo:
        below = tree.get(todo.pop(), [])
        found += below
        todo += below
    return found


def children() -> dict[int, list[int]]:
    """Return the running children of every process; empty where there is no /proc."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name, in parentheses, may contain anything; the parent is the second field after it.
            state, parent = entry.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                found.setdefault(int(parent), []).append(int(entry.parent.name))
    return found


class Idle:
    """Check for a hung agent: it has had workers, and has had none for longer than the limit."""

    def __init__(self, agent: int, limit_s: float) -> None:
        self.agent = agent
        self.limit_s = limit_s
        self._last = float("inf")
        self._looked = float("-inf")

    def is_over(self) -> bool:
        now = time.monotonic()
        if now - self._looked >= LOOK_S and self.limit_s != float("inf"):
            self._looked = now
            if children().get(self.agent):
                self._last = now
        return now - self._last > self.limit_s

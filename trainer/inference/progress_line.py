"""Lines on stderr about how far a long evaluation or prediction is. Torch-free."""

from __future__ import annotations

import sys
import time

EVERY_S = 10.0


class ProgressLine:
    """Prints a line every EVERY_S seconds, on one rank."""

    def __init__(self, what: str, total: int, *, shown: bool) -> None:
        self.what = what
        self.total = total
        self.shown = shown
        self._began = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        """Note that so many of the total are done."""
        now = time.monotonic()
        if not self.shown or now - self._last < EVERY_S or not done:
            return
        self._last = now
        left_s = (now - self._began) * (self.total - done) / done
        print(f"{done} of {self.total} {self.what}, about {left_s:.0f} s left", file=sys.stderr, flush=True)

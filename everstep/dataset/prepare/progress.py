"""Progress of a preparation: a bar on a terminal, plain lines without one, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

LINE_EVERY_S = 10.0


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: `1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Progress:
    """Rows and bytes of the source that are done; updated from several threads."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self.rows = self.bytes = self._skipped = 0
        self._what, self._total, self._shown = what, max(1, total), shown
        self._lock = threading.Lock()
        self._start = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, rate="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, rows: int, size: int) -> None:
        """Add finished rows and bytes."""
        with self._lock:
            self.rows += rows
            self.bytes += size
            if self._bar is not None:
                self._bar.update(self._task, completed=self.bytes, rate=self._rate())
            elif self._shown and time.monotonic() - self._said > LINE_EVERY_S:
                self._said = time.monotonic()
                self.line(f"{self._what}: {self._rate()}, {self._left()}")

    def skip(self, size: int) -> None:
        """Add bytes that were done before, which do not count in the rate."""
        self._skipped += size
        self.add(0, size)

    def line(self, text: str) -> None:
        """Print one line beside the bar, unless nothing is shown."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def _rate(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._start)
        return f"{self.rows:,} rows, {(self.bytes - self._skipped) / 1e6 / seconds:,.0f} MB/s"

    def _left(self) -> str:
        if self.bytes > self._total:  # a generator does not report its size in advance
            return "going on"
        done = max(1, self.bytes - self._skipped)
        seconds = (time.monotonic() - self._start) * (self._total - self.bytes) / done
        return f"{100 * self.bytes / self._total:.0f} %, {seconds:,.0f} s left"

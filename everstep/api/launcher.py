"""The launcher as a process of this one: its lines, its end, and interrupts."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

MOST_LINES = 10_000
"""Lines that are kept until they are read; older ones are in the run's logs."""


class Launcher:
    """`everstep VERB …` in a process group of its own, so that an interrupt of a notebook reaches it once.

    A thread reads its output, whether it is shown or not: a full pipe would hold up the run.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "everstep.launch", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=None if env is None else dict(env),
            process_group=0,
        )
        self._unread: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def lines(self) -> Iterator[str]:
        """Yield the lines that were not yielded before, until the launcher ends."""
        while (line := self._unread.get()) is not None:
            yield line
        self._unread.put(None)  # for the next call

    def interrupt(self) -> None:
        """Send SIGINT: the first one saves and stops, a second one leaves at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Return the exit code, once it has ended."""
        return self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                if self._unread.qsize() >= MOST_LINES:
                    self._unread.get_nowait()
                self._unread.put(line.rstrip("\n"))
        self._unread.put(None)

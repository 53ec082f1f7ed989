"""Signals of this process as a queue."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """Signals as a queue: a handler only records the number, and a pipe wakes the loop that reads it."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            # A signal that the caller ignores (nohup, a shell's background job) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN or number is signal.SIGCHLD:
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._arrived.append(number)

    def take(self) -> list[int]:
        """Return the signals since the last call, in order."""
        taken, self._arrived[:] = list(self._arrived), []
        return taken

    def wait(self, seconds: float, others: Sequence[int] = ()) -> None:
        """Wait until a signal arrives, a child ends, one of `others` can be read, or the time is over."""
        select.select([self._read, *others], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

"""Stop requests: a signal, the wall-time budget or the stop marker only sets a flag.

The handlers are installed before torch is imported, so that a signal during the start of a process is not lost. All
ranks agree to stop by the all-reduce of a step's loss, at no extra cost.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from everstep.config import StopConfig
from everstep.run_folder import GRACE, STOP_MARKER, RunFolder

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Stop request of this process, with its reason."""

    def __init__(self) -> None:
        self.reason = ""
        self.grace_s: float | None = None
        self._asked_at: float | None = None
        self.started = time.monotonic()
        self.began = time.time()
        """Start of this process in seconds since the epoch; set before any heavy import."""
        self._deadline = float("inf")
        self._closed = threading.Event()

    @property
    def asked(self) -> bool:
        return bool(self.reason) or self._out_of_time()

    def left_s(self) -> float | None:
        """Return the seconds until this process is killed; None if it was not asked to stop, or if unknown."""
        if self._asked_at is None or self.grace_s is None:
            return None
        return max(0.0, self._asked_at + self.grace_s - time.monotonic())

    def _out_of_time(self) -> bool:
        if time.monotonic() < self._deadline:
            return False
        self.reason = "wall-time budget used up (stop.wall_time_s)"
        return True

    def listen(self) -> None:
        """Install the signal handlers. A second SIGINT exits at once, without saving."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a fork server blocks them until here

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == signal.Signals(number).name:
            os._exit(130)
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self._asked_at = self._asked_at or time.monotonic()
        self.reason = self.reason or reason

    def watch(self, config: StopConfig, folder: RunFolder | None) -> None:
        """Start the wall-time budget. The rank that is given the folder also polls for the stop marker."""
        said = os.environ.get(GRACE, "")
        self.grace_s = config.grace_s if config.grace_s is not None else float(said) if said else None
        if config.wall_time_s is not None:
            self._deadline = self.started + config.wall_time_s
        if folder is not None:
            threading.Thread(target=self._poll, args=(config.poll_s, folder), daemon=True).start()

    def _poll(self, poll_s: float, folder: RunFolder) -> None:
        while not self._closed.wait(poll_s):
            if folder.storage.exists(STOP_MARKER):
                self._ask("stop marker in the run folder")
                return

    def close(self) -> None:
        self._closed.set()

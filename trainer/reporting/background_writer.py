"""Background writer of small files to a run folder, so that no step waits for a slow store."""

from __future__ import annotations

import logging
import threading

from everstep.errors import StorageError
from everstep.storage import Storage

LOG = logging.getLogger("everstep")
AGAIN_S = 5.0
"""Seconds until a file that the store refused is written again."""
CLOSE_S = 30.0
"""Seconds that the end of a run waits for files that are not yet written."""


class BackgroundWriter:
    """Thread that writes files in the order of `put`; a newer version replaces one not yet written."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._waiting: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are not yet written."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, path: str, data: bytes) -> None:
        with self._changed:
            self._waiting[path] = data
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until all is written or the time is over; True if all is written."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
        for path in self._waiting:
            LOG.warning("%s could not be written to %s", path, self.storage.url)
        return not self._waiting

    def _run(self) -> None:
        while (path := self._next()) is not None:
            data = self._waiting[path]
            try:
                self.storage.write(path, data)
            except (OSError, StorageError) as error:
                LOG.warning("%s is behind, training goes on: %s", path, error)
                with self._changed:
                    self._changed.wait(AGAIN_S)
                continue
            with self._changed:
                if self._waiting[path] is data:
                    del self._waiting[path]

    def _next(self) -> str | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return next(iter(self._waiting), None)

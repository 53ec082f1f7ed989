"""Small files on their way to a run folder while training goes on: what a slow store takes, no step waits for."""

from __future__ import annotations

import logging
import threading

from everstep.errors import StorageError
from everstep.storage import Storage

LOG = logging.getLogger("everstep")
AGAIN_S = 5.0
"""Until a file that the store refused is tried again."""
CLOSE_S = 30.0
"""How long the end of a run waits for what is still on its way."""


class Outbox:
    """One thread that writes in the order of `put`; of a file that is put again before it left, only the newer goes."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._waiting: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waiting_bytes(self) -> int:
        """Bytes that have not left yet."""
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
        """Wait until all is written, or until the time is over; whether all is."""
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

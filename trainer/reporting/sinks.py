"""Sinks of metrics and events: JSON lines always, W&B and TensorBoard on request.

Metrics are keyed by step, and a step that is replayed after a restart supersedes its earlier record. A sink that fails
never stops training: the run's own file is written later, and other sinks are not used for a minute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from everstep.run_folder import METRICS, RunFolder
from everstep.storage import Storage
from everstep.trainer.reporting.background_writer import BackgroundWriter
from everstep.trainer.reporting.media_record import MediaSink

LOG = logging.getLogger("everstep")
PART_EVERY_S = 30.0
NO_METRICS = ("kind", "step", "time", "unit")
"""Keys of a record that describe it; they are not plotted."""
AGAIN_S = 60.0
"""Seconds for which a sink that has failed is not used."""
CLOSE_S = 5.0
"""Seconds for which the end of a run waits for a file that cannot be written."""
LARGEST_BACKLOG = 8 << 20
"""Bytes of records that wait for a disk or a store, and again as many in the background writer."""
Record = Mapping[str, Any]


class Sink(Protocol):
    """Destination of metrics. `log` may be called again for a step that was replayed."""

    def log(self, record: Record) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """A file of JSON lines; on an object store, which cannot append, numbered parts written regularly.

    Records that a disk or a store does not accept are kept, up to LARGEST_BACKLOG, and written with the next record.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path
        self.part_every_s = PART_EVERY_S
        """Seconds between parts on a store."""
        self._parts = 0
        self._written = time.monotonic()
        self._outbox = BackgroundWriter(storage)
        self._backlog = bytearray()
        self._local = storage.path(path)
        self._file: int | None = None
        self._torn = False
        """True if the file ends in the middle of a line; the backlog begins with the rest of it."""
        self._failing = False

    def log(self, record: Record) -> None:
        self._backlog += json.dumps(record).encode() + b"\n"
        if len(self._backlog) > LARGEST_BACKLOG:
            self._shorten()
        if self._local is not None:
            self._append()
        elif time.monotonic() - self._written > self.part_every_s:
            self.flush()

    def flush(self) -> None:
        """Pass a part to the background writer, if the parts before it are not too far behind."""
        if self._backlog and self._outbox.waiting_bytes < LARGEST_BACKLOG:
            stem, dot, suffix = self.path.rpartition(".")
            self._outbox.put(f"{stem}-{self._parts:05d}{dot}{suffix}", bytes(self._backlog))
            self._parts += 1
            self._backlog.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        if self._local is None:
            self.flush()
            self._outbox.close()
            return
        deadline = time.monotonic() + CLOSE_S
        while self._backlog and not self._append() and time.monotonic() < deadline:
            time.sleep(0.2)
        if self._backlog:
            LOG.warning("%s lacks its last %d bytes", self._local, len(self._backlog))
        self._give_up_file()

    def _append(self) -> bool:
        """Write the backlog; True if the file has accepted all of it."""
        try:
            if self._file is None and self._local is not None:
                self._local.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._local, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            while self._backlog and self._file is not None:
                written = os.write(self._file, self._backlog)
                self._torn = self._backlog[written - 1 : written] != b"\n"
                del self._backlog[:written]
        except OSError as error:
            self._give_up_file()
            if not self._failing:
                say_behind(self._local, error)
            self._failing = True
            return False
        self._failing = False
        return True

    def _give_up_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a file server may report a failed write late
                os.close(self._file)
            self._file = None

    def _shorten(self) -> None:
        """Drop the older half of the backlog."""
        cut = self._backlog.index(b"\n", len(self._backlog) // 2) + 1
        del self._backlog[:cut]
        if self._torn:
            self._backlog[:0] = b"\n"  # so that the torn line damages no other
            self._torn = False
        LOG.warning("%s: what could not be written has grown too large, and its older half is left out", self.path)


def say_behind(file: object, error: OSError) -> None:
    warn(f"{file} is behind, training goes on and it is tried again: {error.strerror or error}")


def warn(line: str) -> None:
    """Write a warning of one line to the rank's log and to the console, which may be on another disk."""
    line = " ".join(line.split())
    LOG.warning("%s", line)
    print(f"warning: {line}", file=sys.stderr, flush=True)


def read_lines(folder: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """Yield the records of all attempts in the order of writing, without lines truncated by a kill."""
    for attempt in folder.attempts():
        yield from folder.lines(attempt, name)


def read_metrics(folder: RunFolder, kind: str = "train") -> dict[int, dict[str, Any]]:
    """Return the last record of each step, `kind` train or evaluate, in the order of steps."""
    records = {r["step"]: r for r in read_lines(folder, METRICS) if r.get("kind") == kind}
    return dict(sorted(records.items()))


class Guarded:
    """A sink whose failures are warnings: after one it is not used for a while, and then tried again."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.sink = sink
        self._off_until: float | None = None

    def log(self, record: Record) -> None:
        if self._off_until is None or time.monotonic() >= self._off_until:
            self._try(lambda: self.sink.log(record))

    def media(self, record: Record) -> None:
        """Pass on a text, picture, table or histogram, if the sink shows such."""
        sink = self.sink
        if isinstance(sink, MediaSink) and (self._off_until is None or time.monotonic() >= self._off_until):
            self._try(lambda: sink.media(record))

    def close(self) -> None:
        if self._off_until is None:
            self._try(self.sink.close)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if self._off_until is None:
                warn(f"{self.name} failed and is switched off, training goes on: {type(error).__name__}: {error}")
            self._off_until = time.monotonic() + AGAIN_S
            return
        if self._off_until is not None:
            LOG.warning("%s works again", self.name)
            self._off_until = None

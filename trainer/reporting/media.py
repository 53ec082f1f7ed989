"""Log of the texts, pictures, tables and histograms of a run: `log_text` and its siblings.

What is logged is copied at once and written by a thread. It goes to the trackers with the record of its step, so that
they get the steps in their order.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from everstep.run_folder import MEDIA, PICTURES, RunFolder
from everstep.trainer.reporting.background_writer import BackgroundWriter
from everstep.trainer.reporting.media_record import Media, Pixels, checked_name, histogram_of, pixels_of, table_of
from everstep.trainer.reporting.sinks import JsonLines, warn
from everstep.trainer.reporting.trackers.sink_thread import SinkThread

LOG = logging.getLogger("everstep")
LARGEST = 16 << 20
"""Bytes of one text, table, or picture before it is compressed."""
LARGEST_BACKLOG = 64 << 20
"""Bytes that wait for the disk or store."""
LARGEST_TOTAL = 2 << 30
"""Bytes of one attempt, pictures compressed."""
BURST, PER_S = 128.0, 2.0
"""Records at once, and per second in the long run."""
CLOSE_S = 30.0


def log_text(name: str, text: str) -> None:
    """Record a text of this step, on rank 0; elsewhere, and outside of a run, nothing happens."""
    if (log := _open[-1] if _open else None) is not None:
        log.add("text", checked_name("log_text", name), {"text": str(text)})


def log_image(name: str, image: Any, caption: str = "") -> None:
    """Record a picture of this step, on rank 0: uint8 of shape (H, W), (H, W, 3) or (3, H, W)."""
    if (log := _open[-1] if _open else None) is not None:
        pixels = pixels_of(checked_name("log_image", name), image)
        height, width = pixels.shape[:2]
        log.add("image", name, {"caption": str(caption), "height": height, "width": width}, pixels)


def log_table(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Record a table of this step, on rank 0: the names of its columns, and its rows."""
    if (log := _open[-1] if _open else None) is not None:
        log.add("table", name, table_of(checked_name("log_table", name), columns, rows))


def log_histogram(name: str, values: Any, bins: int = 64) -> None:
    """Record how values are spread at this step, on rank 0: an array or tensor of any shape."""
    if (log := _open[-1] if _open else None) is not None:
        log.add("histogram", name, histogram_of(checked_name("log_histogram", name), values, bins))


class MediaLog:
    """Media of one attempt on rank 0; each name once a step."""

    def __init__(
        self, folder: RunFolder, attempt: int, trackers: Sequence[SinkThread], step: Callable[[], int]
    ) -> None:
        """`step` returns the step that is being computed."""
        self.folder = folder
        self.attempt = attempt
        self.trackers = trackers
        self._step = step
        self._hook_step: int | None = None
        self._held: list[Media] = []
        """Records whose step has no training record yet."""
        self._names: set[str] = set()
        self._names_of = -1
        self._count = 0
        self._allowed, self._since = BURST, time.monotonic()
        self._left_out: Counter[str] = Counter()
        self._writer = MediaWriter(folder, attempt)

    def add(self, kind: str, name: str, content: dict[str, Any], pixels: Pixels | None = None) -> None:
        step = self._step() if self._hook_step is None else self._hook_step
        if step != self._names_of:
            self._names, self._names_of = set(), step
        record = {"kind": "media", "type": kind, "name": name, "step": step, "time": time.time(), **content}
        if pixels is not None:
            slug = re.sub(r"[^A-Za-z0-9_]+", "-", name)[:64]
            record["file"] = f"{PICTURES}/{step:08d}-{slug}-{self._count:06d}.png"
        media = Media(record, pixels)
        if reason := self._refusal(media):
            self._leave_out(media, reason)
            return
        self._names.add(name)
        self._count += 1
        self._held.append(media)

    def release(self, step: int | None = None) -> None:
        """Write what was logged up to `step` (None: all), before the training record of that step is written."""
        if not self._held:
            return
        due = [media for media in self._held if step is None or media.record["step"] <= step]
        self._held = [media for media in self._held if step is not None and media.record["step"] > step]
        for media in due:
            if not self._writer.put(media):
                self._leave_out(media, "the disk or store is behind")
                continue
            for tracker in self.trackers:
                tracker.media(media)

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Log under a step that was computed earlier, as hooks see it on a GPU."""
        self._hook_step = step
        try:
            yield
        finally:
            self._hook_step = None

    def open(self) -> None:
        """Begin to take what `log_text` and its siblings are given; passes before training log nothing."""
        _open[:] = [self]

    def close(self) -> None:
        if self in _open:
            _open.remove(self)
        self.release()
        self._writer.close()
        if lost := self._writer.left_out:
            self._left_out["they could not be written"] += lost
        if total := self._left_out.total():
            why = ", ".join(f"{count} because {reason}" for reason, count in self._left_out.most_common())
            warn(f"{total} texts, pictures, tables or histograms were left out: {why}")

    def _refusal(self, media: Media) -> str:
        """Return why a record is left out; empty if it is not."""
        if media.record["name"] in self._names:
            return "a name is recorded once a step, the first"
        if media.size > LARGEST:
            return f"one is at most {LARGEST >> 20} MiB"
        if sum(held.size for held in self._held) + media.size > LARGEST_BACKLOG:
            return "too much is logged in a step"
        if self._writer.total > LARGEST_TOTAL:
            return f"an attempt records at most {LARGEST_TOTAL >> 30} GiB"
        now = time.monotonic()
        self._allowed, self._since = min(BURST, self._allowed + (now - self._since) * PER_S), now
        if self._allowed < 1:
            return f"at most {PER_S:.0f} a second are recorded in the long run"
        self._allowed -= 1
        return ""

    def _leave_out(self, media: Media, reason: str) -> None:
        self._left_out[reason] += 1
        if self._left_out[reason] == 1:
            name, step = media.record["name"], media.record["step"]
            LOG.warning("log_%s(%r) of step %d is left out: %s", media.record["type"], name, step, reason)


_open: list[MediaLog] = []
"""The log of the run that this process trains; empty on ranks other than 0."""


class MediaWriter:
    """Thread that encodes pictures and writes media to the run folder; it starts with the first record."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self.folder = folder
        self.attempt = attempt
        self.total = 0
        """Bytes written so far."""
        self.left_out = 0
        """Records whose writing has failed."""
        self._waiting: deque[Media] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, media: Media) -> bool:
        """Pass a record to the thread; False if too much waits."""
        with self._changed:
            if self._waiting_bytes + media.size > LARGEST_BACKLOG:
                return False
            self._waiting.append(media)
            self._waiting_bytes += media.size
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="media", daemon=True)
            self._thread.start()
        return True

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        self.left_out += len(self._waiting)

    def _run(self) -> None:
        lines = JsonLines(self.folder.storage, self.folder.attempt(self.attempt, MEDIA))
        pictures = BackgroundWriter(self.folder.storage)
        while (media := self._next()) is not None:
            try:
                self._write(media, lines, pictures)
            except Exception as error:
                self.left_out += 1
                LOG.warning("a record of %s could not be written: %s", MEDIA, error)
        pictures.close()
        lines.close()

    def _write(self, media: Media, lines: JsonLines, pictures: BackgroundWriter) -> None:
        if media.pixels is not None:
            if pictures.waiting_bytes > LARGEST_BACKLOG:
                self.left_out += 1
                return
            pictures.put(self.folder.attempt(self.attempt, media.record["file"]), media.png)
        lines.log(media.record)
        self.total += len(media.png) if media.pixels is not None else media.size

    def _next(self) -> Media | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return None
            media = self._waiting.popleft()
            self._waiting_bytes -= media.size
            return media


def read_media(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the last record of each step and name by step; `path` is the picture's in the folder."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for attempt in folder.attempts():
        for record in folder.lines(attempt, MEDIA):
            if "file" in record:
                record["path"] = folder.attempt(attempt, str(record["file"]))
            found[int(record["step"]), str(record["name"])] = record
    return sorted(found.values(), key=lambda record: int(record["step"]))

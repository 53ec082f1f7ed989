"""One save on its way from the staging buffer to its commit, in a thread beside training."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from blake3 import blake3

from everstep.errors import CheckpointError, EverstepError, SupersededError
from everstep.storage import Storage
from everstep.trainer.checkpoint.manifest import FileRecord
from everstep.trainer.checkpoint.rank_messages import Meeting

LOG = logging.getLogger("everstep")
BLOCK_BYTES = 8 * 2**20
COMMITTED = "committed"
NICE = 10
"""Where cores are short, a thread with this niceness gets a tenth of what a training thread gets."""

Files = dict[str, FileRecord]


class Flight:
    """Writes this rank's part and tells rank 0, which commits when all parts are there and tells all how it went.

    Args:
        write: puts this rank's files where they belong; size and digest of each.
        commit: on rank 0, with the files of all ranks; its word goes to all. What it raises, no rank takes for a
            checkpoint.
        seal: on every rank, with that word.
        after: on every rank, once there is a checkpoint; no part of the time that the save took.
    """

    def __init__(
        self,
        write: Callable[[], Files],
        commit: Callable[[Files], str],
        seal: Callable[[str], None],
        meeting: Meeting,
        timeout_s: float,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.seconds = 0.0
        """From the start to the commit, once it has ended."""
        self._write = write
        self._commit = commit
        self._seal = seal
        self._meeting = meeting
        self._timeout_s = timeout_s
        self._after = after
        self._verdict = ""
        meeting.open()
        self._thread = threading.Thread(target=self._fly, name="save", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; whether it came in time."""
        self._thread.join(timeout_s)
        return self.has_ended

    def error(self) -> EverstepError | None:
        """Why there is no checkpoint, the same on all ranks; None when there is one. For a flight that has ended."""
        kind, _, text = self._verdict.partition(": ")
        if kind == COMMITTED:
            return None
        return SupersededError(text) if kind == SupersededError.__name__ else CheckpointError(text or "it broke off")

    def _fly(self) -> None:
        _lower_priority()
        try:
            self._meeting.say(self._word())
            self._verdict = self._decide() if self._meeting.rank == 0 else self._meeting.listen()
            kind, _, word = self._verdict.partition(": ")
            if kind == COMMITTED:
                self._seal(word)
        except Exception as error:  # the store has gone, and with it the other ranks; or this node is full
            self._verdict = self._verdict or _said(error)
            LOG.warning("the end of a save: %s", _said(error))
        self.seconds = time.perf_counter() - self.started
        if self._after is not None and self.error() is None:
            self._after()

    def _word(self) -> str:
        try:
            return json.dumps({name: asdict(record) for name, record in self._write().items()})
        except Exception as error:
            return f"!{_said(error)}"

    def _decide(self) -> str:
        try:
            words = self._meeting.hear(self._timeout_s)
            verdict = next((word[1:] for word in words if word.startswith("!")), "")
            if not verdict:
                files = {name: FileRecord(**record) for word in words for name, record in json.loads(word).items()}
                verdict = f"{COMMITTED}: {self._commit(files)}"
        except Exception as error:
            verdict = _said(error)
        self._meeting.tell(verdict)
        return verdict


@dataclass(frozen=True)
class Landed:
    """What became of one save. `stall_s`: how long training stood still; `seconds`: until it was durable, or failed."""

    step: int
    bytes: int
    stall_s: float
    seconds: float
    error: str = ""
    local: bool = False
    """To the nodes' own tier."""


@dataclass
class Save:
    """A save that is under way."""

    step: int
    bytes: int
    stall_s: float
    flight: Flight
    local: bool


def write_file(storage: Storage, path: str, data: memoryview) -> FileRecord:
    """Stream bytes into a file, digesting them on the way."""
    digest = blake3()
    with storage.writer(path) as file:
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            file.write(block)
            digest.update(block)
    return FileRecord(len(data), digest.hexdigest())


def record_of(data: bytes) -> FileRecord:
    return FileRecord(len(data), blake3(data).hexdigest())


def _said(error: Exception) -> str:
    if not isinstance(error, EverstepError | OSError):
        LOG.exception("a save broke off")  # a fault of ours: the log has to say where
    return f"{type(error).__name__}: {str(error) or 'no more is known'}"


def _lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere it would be the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

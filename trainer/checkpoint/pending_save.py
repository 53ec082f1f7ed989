"""Pending save: one save from the staging buffer to its commit, in a background thread."""

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
from torch._C._distributed_c10d import Store

from everstep.errors import CheckpointError, EverstepError, SupersededError
from everstep.storage import Storage
from everstep.trainer.checkpoint.manifest import FileRecord

FIRST_LOOK_S, LONGEST_LOOK_S = 0.005, 0.1
"""Seconds between two checks of the store. Its own `wait` prints a page for each time-out."""


class SaveCoordinator:
    """Exchange of one message from every rank to rank 0, and one from rank 0 to all.

    Without a store there is only one rank. The store's client admits one thread at a time, so this has its own
    connection.
    """

    def __init__(self, store: Store | None, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self._store = store.clone() if store is not None else None  # type: ignore[attr-defined]
        self._number = 0
        self._alone = ""

    def open(self) -> None:
        """Begin the next exchange; all ranks must take part."""
        self._number += 1
        if self._store is not None and self.rank == 0 and self._number > 2:
            # A rank that takes part in this exchange has received the message before the last, so its key can go.
            self._store.delete_key(self._key("told", self._number - 2))

    def say(self, word: str) -> None:
        """Send this rank's message to rank 0."""
        if self._store is None:
            self._alone = word
        else:
            self._store.set(self._key(self.rank), word)

    def hear(self, timeout_s: float) -> list[str]:
        """Receive on rank 0 the message of each rank.

        Raises:
            CheckpointError: a rank has sent none within `timeout_s`.
        """
        if self._store is None:
            return [self._alone]
        keys = [self._key(rank) for rank in range(self.world)]
        if not self._wait(keys, time.monotonic() + timeout_s):
            silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise CheckpointError(f"rank {silent[0]} has not written its part within {timeout_s:.0f} s")
        words = [self._store.get(key).decode() for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return words

    def tell(self, word: str) -> None:
        """Broadcast rank 0's message to all ranks."""
        if self._store is not None:
            self._store.set(self._key("told"), word)

    def listen(self) -> str:
        """Receive rank 0's message on another rank, without a time limit.

        If rank 0 dies, this process soon ends too.
        """
        if self._store is None:
            raise RuntimeError("one rank alone has nobody to listen to")
        self._wait([self._key("told")], float("inf"))
        return str(self._store.get(self._key("told")).decode())

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Wait until all the keys exist; False if the deadline passed first."""
        pause_s = FIRST_LOOK_S
        while self._store is not None and not self._store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        return True

    def _key(self, who: int | str, number: int | None = None) -> str:
        return f"save/{self._number if number is None else number}/{who}"


LOG = logging.getLogger("everstep")
BLOCK_BYTES = 8 * 2**20
COMMITTED = "committed"
NICE = 10
"""Niceness of the thread of a save.

Where cores are short, it gets a tenth of a training thread's time.
"""

Files = dict[str, FileRecord]


class PendingSave:
    """A pending save: writes this rank's files and reports them to rank 0, which commits and broadcasts.

    Args:
        write: writes this rank's files; returns size and digest of each.
        commit: called on rank 0 with the files of all ranks; its result is broadcast. If it raises, no rank counts the
            save as a checkpoint.
        seal: called on every rank with the result of `commit`.
        after: called on every rank once the checkpoint is committed; not counted in the time of the save.
    """

    def __init__(
        self,
        write: Callable[[], Files],
        commit: Callable[[Files], str],
        seal: Callable[[str], None],
        meeting: SaveCoordinator,
        timeout_s: float,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.seconds = 0.0
        """From the start to the commit, set when the save has ended."""
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
        """Wait for the save to end; True if it ended in time."""
        self._thread.join(timeout_s)
        return self.has_ended

    def error(self) -> EverstepError | None:
        """Return the error of an ended save, the same on all ranks; None if it was committed."""
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
        except Exception as error:  # the store is gone, and with it the other ranks; or this node's disk is full
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
class FinishedSave:
    """Result of one save.

    `stall_s` is the time training paused; `seconds` the time until the save was durable, or failed.
    """

    step: int
    bytes: int
    stall_s: float
    seconds: float
    error: str = ""
    local: bool = False
    """True if the save was to the node tier."""


@dataclass
class Save:
    """A save that is pending."""

    step: int
    bytes: int
    stall_s: float
    flight: PendingSave
    local: bool


def write_file(storage: Storage, path: str, data: memoryview) -> FileRecord:
    """Stream bytes into a file and return its record, digested on the way."""
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
        LOG.exception("a save broke off")  # a fault of everstep, so the log must have its traceback
    return f"{type(error).__name__}: {str(error) or 'no more is known'}"


def _lower_priority() -> None:
    if sys.platform == "linux":  # on other systems it would apply to the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

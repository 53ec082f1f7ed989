"""Pending save: one save from the staging buffer to its commit, in a background thread.

checkpointer.py describes the path of a save and of its failure.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch._C._distributed_c10d import HashStore, Store

from everstep.errors import CheckpointError, EverstepError, SupersededError
from everstep.trainer.checkpoint.manifest import FileRecord, Files

LOG = logging.getLogger("everstep")
FIRST_POLL_S, LONGEST_POLL_S = 0.005, 0.1
"""Seconds between two checks of the store. Its own `wait` prints a page for each time-out."""
NICE = 10
"""Niceness of the thread of a save.

Where cores are short, it gets a tenth of a training thread's time.
"""

Message = dict[str, Any]
"""`{"ok": value}`, or `{"error": text, "kind": name of the exception}`; sent as JSON."""


class SaveTarget(Protocol):
    """Destination of one save: the run folder, or the node tier. Used in the thread of the save."""

    def write(self) -> Files:
        """Write the files of this rank; return size and digest of each."""

    def commit(self, files: Files) -> str:
        """Commit on rank 0, with the files of all ranks; return the payload to `seal` with.

        If it raises, no rank counts the save as a checkpoint.
        """

    def seal(self, payload: str) -> None:
        """Complete the checkpoint on every rank once it is committed."""

    def after(self) -> None:
        """Do work on every rank that is not counted in the time of the save."""


@dataclass(frozen=True)
class SaveRecord:
    """One save: `stall_s` is the time training paused, `seconds` the time until it was durable, or failed."""

    step: int
    bytes: int
    stall_s: float
    local: bool = False
    """True if the save is to the node tier."""
    automatic: bool = False
    """True if it is one of the copies that are made as often as the time allows."""
    seconds: float = 0.0
    error: str = ""
    """Set, like `seconds`, when the save has ended; empty if it was committed."""


class SaveCoordinator:
    """Exchange of one message from every rank to rank 0, and one from rank 0 to all.

    The store's client admits one thread at a time, so this has its own connection. Without a store there is only one
    rank, which writes to itself.
    """

    def __init__(self, store: Store | None, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self._store: Store = HashStore() if store is None else store.clone()  # type: ignore[attr-defined]
        self._number = 0

    def open(self) -> None:
        """Begin the next exchange; all ranks must take part."""
        self._number += 1
        if self.rank == 0 and self._number > 2:
            # A rank that takes part in this exchange has received the result before the last, so its key can go.
            self._store.delete_key(self._key("result", self._number - 2))

    def report(self, message: Message) -> None:
        """Send this rank's message to rank 0."""
        self._store.set(self._key(self.rank), json.dumps(message))

    def collect(self, timeout_s: float) -> list[Message]:
        """Receive on rank 0 the message of each rank.

        Raises:
            CheckpointError: a rank has sent none within `timeout_s`.
        """
        keys = [self._key(rank) for rank in range(self.world)]
        if not self._wait(keys, time.monotonic() + timeout_s):
            silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise CheckpointError(f"rank {silent[0]} has not written its part within {timeout_s:.0f} s")
        messages = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return messages

    def announce(self, result: Message) -> None:
        """Broadcast the result from rank 0 to all ranks."""
        self._store.set(self._key("result"), json.dumps(result))

    def await_result(self) -> Message:
        """Receive rank 0's result on another rank, without a time limit.

        If rank 0 dies, this process soon ends too.
        """
        self._wait([self._key("result")], float("inf"))
        result: Message = json.loads(self._store.get(self._key("result")))
        return result

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Wait until all the keys exist; False if the deadline passed first."""
        pause_s = FIRST_POLL_S
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_POLL_S)
        return True

    def _key(self, name: int | str, number: int | None = None) -> str:
        return f"save/{self._number if number is None else number}/{name}"


class PendingSave:
    """A save that has begun: each rank writes and reports, rank 0 commits and announces the result."""

    def __init__(self, record: SaveRecord, target: SaveTarget, coordinator: SaveCoordinator, timeout_s: float) -> None:
        """Start the thread.

        Args:
            timeout_s: seconds after which a rank that has not reported makes the save fail.
        """
        self.record = record
        """The save, with `seconds` and `error` once it has ended."""
        self._target = target
        self._coordinator = coordinator
        self._timeout_s = timeout_s
        self._result: Message = {}
        self._started = time.perf_counter()
        coordinator.open()
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)
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
        if "ok" in self._result:
            return None
        kind = SupersededError if self._result.get("kind") == SupersededError.__name__ else CheckpointError
        return kind(self._result.get("error", "it broke off"))

    def _run(self) -> None:
        _lower_priority()
        try:
            self._coordinator.report(self._write())
            self._result = self._commit() if self._coordinator.rank == 0 else self._coordinator.await_result()
            if "ok" in self._result:
                self._target.seal(self._result["ok"])
        except Exception as error:  # the store is gone, and with it the other ranks; or this node's disk is full
            failure = _failure(error)
            self._result = self._result or failure
            LOG.warning("the end of a save: %s: %s", failure["kind"], failure["error"])
        seconds, failed = time.perf_counter() - self._started, self.error()
        self.record = replace(self.record, seconds=seconds, error=str(failed or ""))
        if failed is None:
            self._target.after()

    def _write(self) -> Message:
        """Return this rank's report: its files, or the error."""
        try:
            return {"ok": {name: asdict(record) for name, record in self._target.write().items()}}
        except Exception as error:
            return _failure(error)

    def _commit(self) -> Message:
        """Return the result on rank 0 after announcing it: the payload to seal with, or the first error."""
        try:
            reports = self._coordinator.collect(self._timeout_s)
            result = next((report for report in reports if "error" in report), {})
            if not result:
                files = {name: FileRecord(**record) for report in reports for name, record in report["ok"].items()}
                result = {"ok": self._target.commit(files)}
        except Exception as error:
            result = _failure(error)
        self._coordinator.announce(result)
        return result


def _failure(error: Exception) -> Message:
    if not isinstance(error, EverstepError | OSError):
        LOG.exception("a save broke off")  # a fault of everstep, so the log must have its traceback
    return {"error": str(error) or "no more is known", "kind": type(error).__name__}


def _lower_priority() -> None:
    if sys.platform == "linux":  # on other systems it would apply to the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

"""DST/.prepare: records of a preparation's finished work, so that it can resume after a kill.

.prepare/lock                held while one process of this machine prepares
.prepare/plan.json           the plan, and the number of shards that it appends to
.prepare/unit-000012.json    a finished unit: its sources and its shards
.prepare/digests-000012-…    content digests of a unit's rows, for dedup
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from everstep.dataset.index import INDEX, TRAIN, VALIDATION, ShardIndex
from everstep.dataset.prepare.work_unit import Record
from everstep.errors import DataError, EverstepError, StorageError, printable
from everstep.storage import STAGED, join_url, open_storage

FOLDER = ".prepare"
LOCK = "lock"
BAD = "bad.jsonl"
MADE = "made"
"""Attribute of an index: the marks of the preparations that it holds."""
SHARD = re.compile(r"shard-(\d+)(-\d+)?\.arrow")
SPLITS = ("", TRAIN, VALIDATION)
LONG_S, LOOK_S = 30.0, 0.1
"""Seconds of waiting for the lock until its holder is named, and between two looks."""
LONGEST = 200
"""Characters of a lock file that are shown."""


class Ledger:
    """The records below one dst, a path or a URL."""

    def __init__(self, dst: str) -> None:
        self.dst = dst
        self._storage = open_storage(dst)

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lock the folder against other processes of this machine (or of a shared disk) that prepare it."""
        path = self._storage.path(f"{FOLDER}/{LOCK}")
        if path is None:  # an object store has no lock: two processes that prepare at once write the same bytes twice
            yield
            return
        while True:
            # Another process may have removed the folder when it was done, and the locked file with it.
            with _opened(path) as lock:
                if lock is not None:
                    _take(lock, lambda who: say(f"waits for another process that prepares {self.dst}{who}"))
                    if _is_still(path, lock.fileno()):
                        yield
                        return

    def complete(self) -> bool:
        """True if dst is a dataset, or holds both splits of one."""
        there = [self._storage.exists(join_path(split, INDEX)) for split in SPLITS]
        return there[0] or (there[1] and there[2])

    @contextlib.contextmanager
    def untouched_by_mistakes(self) -> Iterator[None]:
        """Remove an empty folder when an error ends the preparation before any unit is done."""
        try:
            yield
        except EverstepError:
            if not any(name.startswith(("unit", "digests")) for name in self._records()):
                self.forget()
                path = self._storage.path()
                if path is not None and path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            raise

    def indexes(self) -> dict[str, ShardIndex]:
        """Return the complete datasets by split."""
        splits = [split for split in SPLITS if self._storage.exists(join_path(split, INDEX))]
        return {split: ShardIndex.read(folder_of(self.dst, split)) for split in splits}

    def holds(self, mark: str | None) -> bool:
        """True if all the datasets include the result of the preparation with that mark."""
        return all(mark in index.attributes.get(MADE, []) for index in self.indexes().values())

    def clear_up(self) -> None:
        """Remove leftovers of a preparation beside the completed datasets, unless it still appends samples."""
        begun = self.under_way()
        if begun is None:
            self.forget()
        elif not begun["append"] or self.holds(f"{begun['options']}-{begun['source']}"):
            self.end({split: {shard.file for shard in index.shards} for split, index in self.indexes().items()})

    def forget(self) -> None:
        """Remove the records."""
        try:
            self._storage.delete(FOLDER)
        except StorageError:
            # A waiting process has created the lock again meanwhile; it finds the dataset and does the same.
            if self._records() not in ([], [LOCK]):
                raise

    def noted(self) -> list[int]:
        """Return the numbers of the units with a record."""
        names = [re.fullmatch(r"unit-(\d+)\.json", name) for name in self._records()]
        return [int(match[1]) for match in names if match]

    def under_way(self) -> dict[str, Any] | None:
        """Return the plan that was begun and not finished."""
        try:
            plan: dict[str, Any] = json.loads(self._storage.read(f"{FOLDER}/plan.json"))
        except FileNotFoundError:
            return None
        return plan

    def begin(self, plan: dict[str, Any]) -> None:
        self._write("plan.json", plan)

    def refuse_foreign(self) -> None:
        """Raise DataError if dst holds files that no preparation wrote."""
        path = self._storage.path()
        if path is not None and path.exists() and not path.is_dir():
            raise DataError(f"{self.dst} exists and is no prepared dataset but a file; choose another dst")
        foreign = [
            name
            for name in self._storage.names()
            if name not in (BAD, INDEX, *SPLITS) and not name.startswith(".") and not _is_ours(name)
        ]
        if foreign:
            raise DataError(f"{self.dst} exists and is no prepared dataset; choose another dst or remove it")

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the record of unit `number`, if all its shards are still stored with their full size."""
        try:
            note: dict[str, Any] = json.loads(self._storage.read(f"{FOLDER}/unit-{number:06d}.json"))
            for split, shards in Record.from_json(note["record"]).shards.items():
                if any(self._storage.size(join_path(split, shard.file)) != shard.bytes for shard in shards):
                    return None
        except FileNotFoundError:
            return None
        return note

    def note(self, number: int, made_of: dict[str, str], record: Record) -> None:
        """Record that unit `number` is done; the caller has made its shards durable."""
        self._write(f"unit-{number:06d}.json", {**made_of, "record": record.to_json()})

    def digests(self, name: str) -> bytes | None:
        try:
            return self._storage.read(f"{FOLDER}/{name}")
        except FileNotFoundError:
            return None

    def note_digests(self, name: str, digests: bytes) -> None:
        self._storage.write(f"{FOLDER}/{name}", digests)

    def write_bad(self, lines: list[dict[str, str]], append: bool) -> None:
        """Write the records that were left out to DST/bad.jsonl; with append, after the earlier ones."""
        new = [json.dumps(line, ensure_ascii=False) for line in lines]
        old = self._storage.read(BAD).decode().splitlines() if append and self._storage.exists(BAD) else []
        content = "\n".join(dict.fromkeys([*old, *new]))
        if content:
            self._storage.write(BAD, f"{content}\n".encode())
        else:
            self._storage.delete(BAD)

    def sweep_staged(self) -> None:
        """Remove temporary files of an earlier preparation that was killed."""
        for folder in (FOLDER, *SPLITS):
            path = self._storage.path(folder)
            for left in path.glob(f".*{STAGED}") if path is not None and path.is_dir() else ():
                left.unlink(missing_ok=True)

    def end(self, keep: dict[str, set[str]]) -> None:
        """Remove shards that belong to no dataset, and the records."""
        for split in SPLITS:
            names = self._storage.names(split)
            if INDEX in names and split not in keep:
                continue
            for name in names:
                if _is_ours(name) and name not in keep.get(split, ()):
                    self._storage.delete(join_path(split, name))
            if split and split not in keep and not self._storage.names(split):
                self._storage.delete(split)
        self._storage.delete(FOLDER)

    def _records(self) -> list[str]:
        return self._storage.names(FOLDER)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self._storage.write(f"{FOLDER}/{name}", json.dumps(content).encode())


def join_path(split: str, name: str) -> str:
    return f"{split}/{name}" if split else name


def folder_of(dst: str, split: str) -> str:
    """Return the folder or URL of a split's dataset."""
    return join_url(dst, split) if split else dst


def unit_of(file: str) -> int:
    """Return the unit number in a shard's name; −1 for names that are not ours."""
    match = SHARD.fullmatch(file)
    return int(match[1]) if match else -1


def _is_ours(name: str) -> bool:
    return SHARD.fullmatch(name) is not None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str] | None]:
    """Yield the lock file, created if needed; None if its folder was removed in between."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # 0600: a lock that others could open, they could hold for ever.
        lock = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "r+", errors="replace"
        )
    except OSError as error:
        # It was there when it was to be made, and is no folder now: removed, or always a file.
        if isinstance(error, FileNotFoundError | FileExistsError) and not path.parent.is_file():
            yield None
            return
        raise StorageError(f"cannot write {path.parent}: {error.strerror}") from error
    with lock:
        yield lock


def _is_still(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _take(lock: IO[str], on_wait: Callable[[str], None]) -> None:
    """Lock the file and write the holder into it.

    Args:
        on_wait: called at the start of a wait, and with the holder after LONG_S.
    """
    if not _is_free(lock):
        on_wait("")
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline and not (got := _is_free(lock)):
            time.sleep(LOOK_S)
        if not got:
            on_wait(f" ({_holder(lock)}); stop that process if it should not run")
            fcntl.flock(lock, fcntl.LOCK_EX)
    lock.seek(0)
    lock.truncate()
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T %z')}")
    lock.flush()


def _is_free(lock: IO[str]) -> bool:
    """Try to lock the file; False if another process has locked it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return printable(lock.read(LONGEST).strip()) or "it has not written which"

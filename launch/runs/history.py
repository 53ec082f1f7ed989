"""History of a run, read from its folder: submissions, attempts, progress, liveness."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from everstep.errors import ConfigError, EverstepError
from everstep.launch.runs.lookup import is_run
from everstep.launch.runs.record_types import CLAIM, DECISION, SETTLED, START, SUBMITTED, Check, one_line, typed
from everstep.launch.runs.record_types import PROGRESS as PROGRESS_FIELDS
from everstep.launch.schedulers.job import JobHandle
from everstep.outcome import Ending
from everstep.processes import has_run_since
from everstep.run_folder import ATTEMPTS, PROGRESS, RESTARTS, STARTS, SUBMISSIONS, RunFolder

READERS = 16
"""Threads that read in parallel, to hide a store's latency."""


class NotARun(ConfigError):
    """The folder is not a run folder."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of the run. Times are seconds since the epoch."""

    number: int
    claimed_at: float
    began_at: float
    """Start of its first process, before the claim."""
    host: str = ""
    pid: int | None = None
    world: int | None = None
    ending: Ending | None = None


@dataclass(frozen=True)
class Start:
    """One job start: the scheduler gave the run its nodes."""

    at: float
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """One submission of a job."""

    number: int
    at: float
    scheduler: str = ""
    handle: JobHandle | None = None
    is_settled: bool = False
    """True once the result of the submission is recorded; settled without a handle, it created no job."""
    intent: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """History of a run, in the order of time."""

    name: str
    url: str
    attempts: tuple[Attempt, ...] = ()
    submissions: tuple[Submission, ...] = ()
    starts: tuple[Start, ...] = ()
    decisions: tuple[dict[str, Any], ...] = ()
    """Decisions of the restart policy or of a user: `reason`, `outcome`, `go_on`, `time`."""
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def handle(self) -> JobHandle | None:
        """Return the newest job; None for a run without a scheduler."""
        return self.submissions[-1].handle if self.submissions else None

    @property
    def started_at(self) -> float | None:
        """Return the time of the first submission or attempt in this history."""
        times = [each.at for each in self.submissions] + [each.began_at for each in self.attempts]
        return min(times, default=None)


def read(folder: RunFolder, newest_only: bool = False) -> History:
    """Read the history of a run. `newest_only` reads one file of each kind, for a list of many runs."""
    there = set(folder.storage.names())
    if not is_run(there):
        raise NotARun(f"{folder.url} is no run folder")
    attempts = folder.attempts() if ATTEMPTS in there else []
    submissions = _numbers(folder, SUBMISSIONS) if SUBMISSIONS in there else []
    starts = _numbers(folder, STARTS, "") if STARTS in there else []
    restarts = _numbers(folder, RESTARTS) if RESTARTS in there else []
    last = slice(-1, None) if newest_only else slice(None)
    with ThreadPoolExecutor(READERS) as pool, one_line(folder):
        return History(
            folder.url.rsplit("/", 1)[-1],
            folder.url,
            tuple(pool.map(lambda number: attempt(folder, number), attempts[last])),
            tuple(pool.map(lambda number: _submission(folder, number), submissions[last])),
            tuple(pool.map(lambda number: _start(folder, number), starts[last])),
            tuple(pool.map(lambda number: _record(folder, f"{RESTARTS}/{number:04d}.json", DECISION), restarts[last])),
            _record(folder, PROGRESS, PROGRESS_FIELDS) if PROGRESS in there else {},
        )


def read_all(folders: Sequence[RunFolder]) -> list[History | EverstepError]:
    """Read the newest records of many runs; an unreadable folder gives its error instead."""

    def one(folder: RunFolder) -> History | EverstepError:
        try:
            with one_line(folder):
                return read(folder, newest_only=True)
        except EverstepError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(one, folders))


def _record(folder: RunFolder, path: str, kinds: Mapping[str, Check]) -> dict[str, Any]:
    """Return a record of the folder, with its fields checked; empty if it is missing or no JSON object."""
    return typed(folder.facts(path), kinds, path)


def attempt(folder: RunFolder, number: int) -> Attempt:
    claim = typed(folder.claim_of(number), CLAIM, folder.attempt(number, "claim.json"))
    at = float(claim.get("time") or 0.0)
    return Attempt(
        number,
        at,
        float(claim.get("began") or at),
        str(claim.get("host") or ""),
        claim.get("pid"),
        claim.get("world"),
        folder.ending(number),
    )


def _submission(folder: RunFolder, number: int) -> Submission:
    intent = _record(folder, f"{SUBMISSIONS}/{number:04d}.json", SUBMITTED)
    settled = _record(folder, f"{SUBMISSIONS}/{number:04d}.handle.json", SETTLED)
    handle = JobHandle.parse(settled["handle"]) if settled.get("handle") else None
    at, scheduler = float(intent.get("time") or 0.0), str(intent.get("scheduler") or "")
    return Submission(number, at, scheduler, handle, bool(settled), intent)


def _start(folder: RunFolder, number: int) -> Start:
    facts = _record(folder, f"{STARTS}/{number:04d}/start.json", START)
    return Start(float(facts.get("time") or 0.0), tuple(map(str, facts.get("hosts") or ())))


def _numbers(folder: RunFolder, where: str, ending: str = ".json") -> list[int]:
    """Return the numbers of files 0001.json, 0002.json …; names such as 0001.handle.json are ignored."""
    stems = (name.removesuffix(ending) for name in folder.storage.names(where) if name.endswith(ending))
    return sorted(int(stem) for stem in stems if stem.isdigit())


START_S = 900.0
"""Seconds that an attempt on another machine may take to its first record before it counts as silent."""
PATIENCE_S = 120.0
RECORDS = 5
"""Consecutive records that must be missing before a run on another machine counts as silent."""


def alive(history: History, now: float) -> bool | None:
    """True if the last attempt lives; None if unknown: on another machine, with its records overdue."""
    last = history.last
    if last is None or last.ending is not None:
        return False
    if is_here(last):
        return has_process(last)
    seen = float(history.progress.get("time") or 0.0)
    if seen < last.claimed_at:
        return True if now - last.claimed_at < START_S else None
    usual = float(history.progress.get("next_s") or 0.0)
    return True if now - seen < max(PATIENCE_S, RECORDS * usual) else None


def is_here(attempt: Attempt) -> bool:
    return attempt.host == socket.gethostname()


def has_process(attempt: Attempt) -> bool:
    """True if the process that claimed the attempt is alive. Compares start times: PIDs are reused."""
    return has_run_since(attempt.pid, attempt.claimed_at)

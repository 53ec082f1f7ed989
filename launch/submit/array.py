"""Submission of many runs as the elements of one job, exactly once.

This is launch/submit/submission.py for many runs at a time:

FOLDER/batches/TOKEN.txt       run folder and spec digest of element N in line N, counted from 0

The order of writes: the list, each run's intent with the token of its element, the submission to the scheduler, each
run's handle. A launcher that finds intents without handles queries the scheduler once per batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from everstep.errors import ConfigError, EverstepError
from everstep.launch.config import JobConfig, job_yaml
from everstep.launch.schedulers.base import Batch, Batching, Scheduler, spec_digest
from everstep.launch.schedulers.job import JobHandle
from everstep.launch.submit.submission import (
    ENDING_S,
    LOOK_S,
    Submission,
    intend,
    is_gone,
    refuse_if_under_way,
    settled,
    submissions,
)
from everstep.launch.submit.trust import Runnable, sign
from everstep.run_folder import JOB, RunFolder
from everstep.storage import open_storage

THREADS = 16
"""Number of run folders that are read or written at the same time."""
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class ArrayMember:
    """One run of a batch."""

    folder: RunFolder
    argv: tuple[str, ...]
    """As `Program.argv`."""
    plugins: tuple[str, ...] = ()
    code: str | None = None
    """As `Program.code`."""


def run_of(url: str, number: int, spec: str | None = None) -> tuple[str, str | None]:
    """Return the run folder of an element of a batch, and the digest of what it runs if the list has one.

    Args:
        spec: digest of the list; None for a list that was made by hand.

    Raises:
        ConfigError: the list lacks the element, or is not the one that was submitted.
    """
    folder, _, name = url.rpartition("/")
    try:
        text = open_storage(folder or ".").read(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{url}: there is no such list of run folders") from error
    if spec is not None and list_digest(text) != spec:
        raise ConfigError(f"{url} is not the list that was submitted: it was changed; submit again")
    lines = text.decode().splitlines()
    if not 0 <= number < len(lines):
        raise ConfigError(f"{url} has {len(lines)} lines and none for element {number} of the array")
    run, _, digest = lines[number].partition("\t")
    return run, (digest or None) if spec is not None else None


def list_digest(text: bytes) -> str:
    import hashlib  # imported late, as it loads OpenSSL

    return hashlib.sha256(text).hexdigest()[:32]


def submit_batch(
    batch: Batch, members: Sequence[ArrayMember], job: JobConfig, scheduler: Batching
) -> list[JobHandle | str]:
    """Return for each run the handle of its job, or a line why it has none.

    A run whose job is queued or running keeps that job; the others become elements of a new one. A run has no job if
    another launcher is submitting it.

    Args:
        batch: its elements are the positions of `members`.

    Raises:
        ConfigError: the scheduler refuses the batch.
    """
    seen = in_threads(lambda member: submissions(member.folder), members)
    jobs: dict[int, JobHandle | str] = {**_alive(seen, scheduler)}
    batch = _with_list(batch, members, job)

    def write(number: int) -> Submission | str:
        try:
            return _intend(members[number], seen[number], job, f"{batch.token}.{number}")
        except ConfigError as error:
            return str(error)

    fresh = [number for number in batch.elements if number not in jobs]
    written = dict(zip(fresh, in_threads(write, fresh), strict=True))
    jobs |= {number: said for number, said in written.items() if isinstance(said, str)}
    intents = {number: made for number, made in written.items() if isinstance(made, Submission)}
    if intents:
        jobs |= _submitted(dataclasses.replace(batch, elements=tuple(intents)), intents, job, scheduler)
    return [jobs[number] for number in batch.elements]


def _alive(seen: Sequence[Sequence[Submission]], scheduler: Scheduler) -> dict[int, JobHandle]:
    """Return number of a run → its job that is queued or running, by one query for all of them."""
    handles = in_threads(lambda each: [submission.handle for submission in each], seen)
    of = {handle: number for number, each in enumerate(handles) for handle in each if handle is not None}
    found, deadline = scheduler.status(list(of)), time.monotonic() + ENDING_S
    while any(status.ending for status in found.values()) and time.monotonic() < deadline:
        time.sleep(LOOK_S)  # a job that is ending, cancelled or not, makes no more progress
        found = scheduler.status(list(of))
    return {of[handle]: handle for handle, status in found.items() if not is_gone(status)}


def _with_list(batch: Batch, members: Sequence[ArrayMember], job: JobConfig) -> Batch:
    """Write the list of run folders and return the batch with its digest."""
    place, _, name = batch.list.rpartition("/")
    lines = [f"{each.folder.storage.url}\t{spec_digest(job, each.argv, each.code)}\n" for each in members]
    text = "".join(lines).encode()
    open_storage(place).create(name, text)
    return dataclasses.replace(batch, spec=list_digest(text))


def _intend(member: ArrayMember, seen: Sequence[Submission], job: JobConfig, token: str) -> Submission:
    if seen and not seen[-1].is_settled:
        raise ConfigError(f"another launcher is submitting {member.folder.url} right now")
    facts = {"scheduler": job.scheduler, "token": token, "argv": list(member.argv), "code": member.code}
    sign(member.folder.storage, Runnable.of(job, member.plugins, member.code))
    made = intend(member.folder, seen, facts)
    member.folder.storage.write(JOB, job_yaml(job).encode())
    return made


def _submitted(
    batch: Batch, intents: Mapping[int, Submission], job: JobConfig, scheduler: Batching
) -> dict[int, JobHandle | str]:
    whole = _accepted(batch, intents, job, scheduler)
    handles = {number: whole.element(number) for number in intents}
    is_ours = in_threads(lambda number: intents[number].settle(handles[number]), intents)
    lost = [
        number
        for number, ours in zip(intents, is_ours, strict=True)
        if not ours and intents[number].handle != handles[number]
    ]
    # This launcher was taken for dead: another one found no job and has submitted its own.
    scheduler.cancel([handles[number] for number in lost])
    said = {number: f"another launcher has submitted {intents[number].folder.url}" for number in lost}
    return {**handles, **said}


def _accepted(batch: Batch, intents: Mapping[int, Submission], job: JobConfig, scheduler: Batching) -> JobHandle:
    try:
        return scheduler.submit(scheduler.render_batch(job, batch))
    except EverstepError:
        # The job may have been accepted although the answer was lost. If the scheduler does not answer this query
        # either, the intents stay open and the next launcher queries again.
        found = scheduler.find(batch.token)
        if found is None:
            in_threads(lambda intent: intent.settle(None), intents.values())
            raise
        return found


def recover(folders: Sequence[RunFolder], scheduler: Scheduler) -> None:
    """Settle the intents that other launchers left without a handle, by one query per batch.

    Raises:
        ConfigError: such a launcher may still be submitting.
    """
    newest = [seen[-1] for seen in in_threads(submissions, folders) if seen]
    is_known = in_threads(lambda submission: submission.is_settled, newest)
    left = [submission for submission, done in zip(newest, is_known, strict=True) if not done]
    batches: dict[str, dict[int, Submission]] = {}
    for submission, token in zip(left, in_threads(lambda each: each.token, left), strict=True):
        batch, _, number = token.rpartition(".")
        if batch:
            batches.setdefault(batch, {})[int(number)] = submission
        else:
            settled(submission, scheduler)
    for batch, members in batches.items():
        _settle(batch, members, scheduler)


def _settle(token: str, members: Mapping[int, Submission], scheduler: Scheduler) -> None:
    found = scheduler.find(token)
    if found is None:
        refuse_if_under_way(next(iter(members.values())))
        found = scheduler.find(token)  # the job may have been created in the meantime
    in_threads(lambda number: members[number].settle(None if found is None else found.element(number)), members)


def in_threads(do: Callable[[A], B], each: Iterable[A]) -> list[B]:
    """Apply `do` to each item in parallel: many small files, each a round trip if in a store."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(do, each))

"""Submission of a run as a job, exactly once.

The intent is written before the job is submitted to the scheduler, the job's handle after it:

submissions/NNNN.json          token, program, host, pid, time: a job with this token is about to be submitted
submissions/NNNN.handle.json   handle of the job; null if none was created and none will be

Both files are create-only, so one of several launchers wins. A launcher that finds an intent without a handle queries
the scheduler for a job with its token: the launcher that wrote the intent may have been killed between the two.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everstep.errors import ConfigError, EverstepError
from everstep.launch.config import JobConfig, job_yaml
from everstep.launch.console import say
from everstep.launch.schedulers.base import Program, Rendered, Scheduler
from everstep.launch.schedulers.job import CANCELLED, JobHandle, JobState, JobStatus, refuse_other_job
from everstep.launch.submit.trust import Runnable, sign
from everstep.processes import has_run_since
from everstep.run_folder import JOB, RESTARTS, SUBMISSIONS, RunFolder

BORN = time.time()
WORN = "worn_out"
"""Outcome in the restart record of a job that was cancelled in favor of a new one."""
ENDING_S, LOOK_S = 300.0, 1.0
"""Seconds to wait for a job that is ending, and between two polls."""
PATIENCE_S = 180.0
"""Seconds before an intent of another machine is taken over: its launcher may still be submitting."""


@dataclass(frozen=True)
class Submission:
    """One entry of submissions/."""

    folder: RunFolder
    number: int

    @property
    def intent(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.folder.storage.read(f"{SUBMISSIONS}/{self.number:04d}.json"))
        return facts

    @property
    def token(self) -> str:
        return str(self.intent["token"])

    @property
    def is_settled(self) -> bool:
        return self.folder.storage.exists(self._handle_file)

    @property
    def handle(self) -> JobHandle | None:
        """Handle of the job; None if it is not recorded yet or if no job was created."""
        try:
            text = json.loads(self.folder.storage.read(self._handle_file))["handle"]
        except FileNotFoundError:
            return None
        return None if text is None else JobHandle.parse(text)

    @property
    def _handle_file(self) -> str:
        return f"{SUBMISSIONS}/{self.number:04d}.handle.json"

    def settle(self, handle: JobHandle | None) -> bool:
        """Record the handle, or that there is no job; False if another process has done so."""
        facts = {"handle": None if handle is None else str(handle), "time": time.time()}
        return self.folder.storage.create(self._handle_file, (json.dumps(facts) + "\n").encode())


def submissions(folder: RunFolder) -> list[Submission]:
    """Return all submissions of a run, the oldest first."""
    names = [name.removesuffix(".json") for name in folder.storage.names(SUBMISSIONS)]
    return [Submission(folder, int(name)) for name in sorted(names) if name.isdigit()]


@dataclass(frozen=True)
class Receipt:
    """Result of a submission."""

    handle: JobHandle
    is_new: bool
    status: JobStatus | None = None
    """Status of a job that was queued or running before this submission."""


def submit(folder: RunFolder, job: JobConfig, program: Program, scheduler: Scheduler) -> Receipt:
    """Return the run's job that is queued or running, or submit a new one.

    A job is cancelled and replaced if the scheduler reports that a new one would start sooner (`JobStatus.worn`).

    Raises:
        ConfigError: the scheduler refuses the job, or another launcher is submitting the run.
    """
    seen = submissions(folder)
    if (present := _present(folder, seen, scheduler)) is not None:
        if present.status is None or not present.status.worn:
            return present
        refuse_other_job(present.handle, present.status, folder.storage.url)
        _give_up(folder, present.handle, present.status.worn, scheduler)
    sign(folder.storage, Runnable.of(job, program.plugins, program.code, () if program.is_trainer else program.argv))
    submission = intend(
        folder,
        seen,
        {
            "scheduler": job.scheduler,
            "token": program.token,
            "argv": list(program.argv),
            "code": program.code,
        },
    )
    folder.storage.write(JOB, job_yaml(job).encode())
    handle = _submit(scheduler, scheduler.render(job, program), submission)
    if not submission.settle(handle) and submission.handle != handle:
        # This launcher was taken for dead: another one found no job and has submitted its own.
        scheduler.cancel([handle])
        raise ConfigError(f"another launcher has submitted {folder.url}; job {handle} of this one was cancelled")
    return Receipt(handle, is_new=True)


def _give_up(folder: RunFolder, handle: JobHandle, why: str, scheduler: Scheduler) -> None:
    """Cancel the job in favor of a new one.

    The pods of the old job save and end; those of the new job take the run over without waiting for them.
    """
    reason = f"{why}; a new job takes the place of {handle}"
    say(reason)
    scheduler.cancel([handle])
    folder.record_restart({"outcome": WORN, "go_on": True, "reason": reason, "restarts": 0})


def _submit(scheduler: Scheduler, rendered: Rendered, submission: Submission) -> JobHandle:
    try:
        return scheduler.submit(rendered)
    except EverstepError:
        # The job may have been accepted although the answer was lost. If the scheduler does not answer this query
        # either, the intent stays open and the next submit queries again.
        found = scheduler.find(submission.token)
        if found is None:
            submission.settle(None)
            raise
        return found


def _present(folder: RunFolder, seen: Sequence[Submission], scheduler: Scheduler) -> Receipt | None:
    """Return the run's job that is queued or running; first wait until a job that is ending has ended."""
    deadline, told = time.monotonic() + ENDING_S, False
    while (found := _alive(seen, scheduler)) is not None and found.status is not None:
        if not found.status.ending and not _is_cancelled(folder, seen):
            return found
        if time.monotonic() > deadline:
            raise ConfigError(f"job {found.handle} has been ending for {ENDING_S:.0f} s; try again when it has ended")
        if not told:
            say(f"waiting for job {found.handle} to end")
            told = True
        time.sleep(LOOK_S)
    return found


def _is_cancelled(folder: RunFolder, seen: Sequence[Submission]) -> bool:
    """True if the run was cancelled after its last submission."""
    names = folder.storage.names(RESTARTS)
    last = folder.facts(f"{RESTARTS}/{names[-1]}") if names else {}
    submitted_at = float(seen[-1].intent["time"]) if seen else 0.0
    return last.get("outcome") == CANCELLED and float(last.get("time") or 0.0) > submitted_at


def current(folder: RunFolder, scheduler: Scheduler) -> Receipt | None:
    """Return the run's job that is queued or running; None if there is none."""
    return _alive(submissions(folder), scheduler)


def _alive(seen: Sequence[Submission], scheduler: Scheduler) -> Receipt | None:
    handles = [handle for submission in seen if (handle := settled(submission, scheduler)) is not None]
    for handle, status in reversed(scheduler.status(handles).items()):
        if not is_gone(status):
            return Receipt(handle, is_new=False, status=status)
    return None


def is_gone(status: JobStatus) -> bool:
    """True if the job is over or unknown: a scheduler forgets only jobs that are over."""
    return status.state.is_over or status.state is JobState.unknown


def settled(submission: Submission, scheduler: Scheduler) -> JobHandle | None:
    """Return the submission's job; an intent without a handle is settled first."""
    if submission.is_settled:
        return submission.handle
    found = scheduler.find(submission.token)
    if found is None:
        refuse_if_under_way(submission)
        found = scheduler.find(submission.token)  # the job may have been created in the meantime
    submission.settle(found)
    return submission.handle


def refuse_if_under_way(submission: Submission) -> None:
    """Raise ConfigError while the launcher that wrote the intent may still submit the job."""
    intent = submission.intent
    here = intent["host"] == socket.gethostname()
    alive = _runs(intent["pid"], intent["time"]) if here else time.time() - intent["time"] < PATIENCE_S
    if alive:
        raise ConfigError(
            f"{submission.folder.url} is being submitted by process {intent['pid']} on {intent['host']}; "
            f"try again when that has ended"
        )


def _runs(pid: int, at: float) -> bool:
    """True if the process that had this PID at that time is still running."""
    return at >= BORN if pid == os.getpid() else has_run_since(pid, at)


def intend(folder: RunFolder, seen: Sequence[Submission], facts: dict[str, Any]) -> Submission:
    """Record that a job is about to be submitted.

    The number follows those in `seen`; if another launcher has taken it meanwhile, ConfigError.
    """
    number = max((submission.number for submission in seen), default=0) + 1
    intent = {**facts, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    if not folder.storage.create(f"{SUBMISSIONS}/{number:04d}.json", (json.dumps(intent) + "\n").encode()):
        raise ConfigError(
            f"another launcher is submitting {folder.url} right now; see what became of it, then try again"
        )
    return Submission(folder, number)

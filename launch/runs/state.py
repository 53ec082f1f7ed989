"""State of a run, with the reason: a pure function of its history and the status of its job."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from everstep.launch.runs.history import Attempt, History
from everstep.launch.schedulers.job import CANCELLED, JobState, JobStatus
from everstep.outcome import Outcome

RESTART_S = 120.0
"""Seconds after the decision to restart within which the new attempt should have claimed its number."""


class RunState(enum.Enum):
    """State of a run, as `everstep ls` shows it."""

    new = "new"
    """Composed; nothing has been started or submitted."""
    queued = "queued"
    starting = "starting"
    """Its processes run, no step is done yet."""
    training = "training"
    restarting = "restarting"
    """The last attempt has failed, the next is about to start."""
    silent = "silent"
    """On another machine, with its records overdue."""
    done = "done"
    stopped = "stopped"
    """Saved and ended before its last step."""
    cancelled = "cancelled"
    failed = "failed"
    lost = "lost"
    """Ended without recording an outcome."""

    @property
    def is_over(self) -> bool:
        """True if the run continues only when a user resumes it."""
        return self in (RunState.done, RunState.stopped, RunState.cancelled, RunState.failed, RunState.lost)


@dataclass(frozen=True)
class RunStatus:
    state: RunState
    why: str = ""


OF_OUTCOME = {
    Outcome.done: RunState.done,
    Outcome.preempted: RunState.stopped,
    Outcome.out_of_memory: RunState.failed,
    Outcome.diverged: RunState.failed,
    Outcome.config_error: RunState.failed,
    Outcome.superseded: RunState.failed,
    Outcome.stalled: RunState.failed,
    Outcome.crashed: RunState.failed,
}
OF_JOB = {
    JobState.succeeded: RunState.lost,
    JobState.failed: RunState.failed,
    JobState.preempted: RunState.stopped,
    JobState.cancelled: RunState.cancelled,
}
"""State by the status of the job, for a run that has recorded no outcome."""


def standing(history: History, job: JobStatus | None, alive: bool | None, now: float) -> RunStatus:
    """Return the state of a run.

    Args:
        job: the scheduler's status of the newest job; None for a run without one.
        alive: True if the processes of the last attempt live, for a run without a scheduler; None if unknown.
    """
    if job is not None and job.state is JobState.pending:
        return RunStatus(RunState.queued, job.reason)
    if job is not None and job.state is JobState.running:
        return _running(history, job)
    if history.submissions and not history.submissions[-1].is_settled and not _cancelled(history):
        return RunStatus(RunState.queued, "submitted, but the launcher ended before it knew the job; resume finds it")
    return _at_rest(history, job, alive, now)


def _running(history: History, job: JobStatus) -> RunStatus:
    last = history.last
    if _cancelled(history):  # its job may still clear its nodes
        return RunStatus(RunState.cancelled, str(history.decisions[-1].get("reason", "")))
    if last is None or last.claimed_at < (job.started_at or 0.0):
        return RunStatus(RunState.starting, job.reason or "the job runs, its processes have not claimed an attempt yet")
    if last.ending is None:
        return dataclasses.replace(_active(history, last), why=job.reason)
    if last.ending.outcome is Outcome.done:
        return RunStatus(RunState.done, "")
    # The reason it stopped, and what it waits for.
    return RunStatus(RunState.restarting, "; ".join(why for why in (_reason(history, last), job.reason) if why))


def _at_rest(history: History, job: JobStatus | None, alive: bool | None, now: float) -> RunStatus:
    """Return the state from the folder, for a run whose job is over, unknown or absent."""
    over = OF_JOB.get(job.state) if job is not None else None
    last, decision = history.last, history.decisions[-1] if history.decisions else {}
    # A submission that created no job is ignored.
    asked = max((each.at for each in history.submissions[-1:] if each.handle is not None), default=0.0)
    decided_at = float(decision.get("time") or 0.0)
    newest = decided_at > max(asked, last.claimed_at if last else 0.0)
    if _cancelled(history):
        return RunStatus(RunState.cancelled, str(decision.get("reason", "")))
    if last is None or last.claimed_at < asked:
        # A program other than the trainer claims no attempt: the decision of the batch script gives the outcome.
        return _decided(decision) if decided_at > asked and not decision.get("go_on") else _without_attempt(job, over)
    if last.ending is None and over is None and alive:
        return _active(history, last)
    if newest and decision.get("go_on") and over is None and now - decided_at < RESTART_S:
        return RunStatus(RunState.restarting, str(decision.get("reason", "")))
    if last.ending is not None:
        return RunStatus(
            OF_OUTCOME[last.ending.outcome], "" if last.ending.outcome is Outcome.done else _reason(history, last)
        )
    if over is not None and job is not None:
        return RunStatus(over, job.reason)
    if alive is None:
        return RunStatus(RunState.silent, f"no sign of attempt {last.number} on {last.host or 'its machine'}")
    return RunStatus(RunState.lost, str(decision.get("reason", "")) if newest else "killed without a word")


def _cancelled(history: History) -> bool:
    """True if the newest event is a cancellation."""
    decision = history.decisions[-1] if history.decisions else {}
    happened = [each.at for each in history.submissions[-1:]] + [each.claimed_at for each in history.attempts[-1:]]
    return decision.get("outcome") == CANCELLED and float(decision.get("time") or 0.0) > max(happened, default=0.0)


def _decided(decision: dict[str, Any]) -> RunStatus:
    if decision.get("outcome") == Outcome.done.value:
        return RunStatus(RunState.done, "")
    return RunStatus(RunState.failed, str(decision.get("reason", "")))


def _without_attempt(job: JobStatus | None, over: RunState | None) -> RunStatus:
    if job is None:
        return RunStatus(RunState.new, "nothing has been started")
    if over is not None:
        return RunStatus(over, job.reason)
    if job.reason:  # the scheduler could not be queried
        return RunStatus(RunState.silent, job.reason)
    return RunStatus(RunState.lost, "the scheduler does not know the job any more, and it left no attempt")


def _active(history: History, last: Attempt) -> RunStatus:
    seen = float(history.progress.get("time") or 0.0)
    return RunStatus(RunState.training if seen > last.claimed_at else RunState.starting)


def _reason(history: History, last: Attempt) -> str:
    """Return why the last attempt ended: the reason of the decision that followed, else of its outcome."""
    decision = history.decisions[-1] if history.decisions else {}
    if float(decision.get("time") or 0.0) > last.claimed_at and decision.get("reason"):
        return str(decision["reason"])
    return (
        "" if last.ending is None else f"{last.ending.outcome.value} at step {last.ending.step}: {last.ending.reason}"
    )

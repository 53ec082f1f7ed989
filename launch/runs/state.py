"""In what state a run is, in one word and with the reason: pure, from its history and what its scheduler says."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from everstep.launch.runs.history import Attempt, History
from everstep.launch.schedulers.job import CANCELLED, JobState, JobStatus
from everstep.run_folder import Outcome

RESTART_S = 120.0
"""Seconds after the decision to start again in which the new attempt should have claimed its number."""


class RunState(enum.Enum):
    """What a list of runs shows."""

    new = "new"
    """Composed; nothing has been started or submitted."""
    queued = "queued"
    starting = "starting"
    """Its processes are there, no step is done yet."""
    training = "training"
    restarting = "restarting"
    """The last attempt has failed, the next is on its way."""
    silent = "silent"
    """On another machine, and without a sign for longer than its steps take."""
    done = "done"
    stopped = "stopped"
    """Saved and ended before its last step."""
    cancelled = "cancelled"
    failed = "failed"
    lost = "lost"
    """Gone without a word."""

    @property
    def is_over(self) -> bool:
        """Nothing more happens unless somebody resumes the run."""
        return self in (RunState.done, RunState.stopped, RunState.cancelled, RunState.failed, RunState.lost)


@dataclass(frozen=True)
class Standing:
    state: RunState
    why: str = ""


OF_OUTCOME = {
    Outcome.done: RunState.done,
    Outcome.preempted: RunState.stopped,
    Outcome.out_of_memory: RunState.failed,
    Outcome.diverged: RunState.failed,
    Outcome.config_error: RunState.failed,
    Outcome.superseded: RunState.failed,
    Outcome.crashed: RunState.failed,
}
OF_JOB = {
    JobState.succeeded: RunState.lost,
    JobState.failed: RunState.failed,
    JobState.preempted: RunState.stopped,
    JobState.cancelled: RunState.cancelled,
}
"""Where the job is over and the run has left no word of its own."""


def standing(history: History, job: JobStatus | None, alive: bool | None, now: float) -> Standing:
    """Where a run stands.

    Args:
        job: what the scheduler says of the newest job; None for a run without one.
        alive: whether the processes of the last attempt are there, for a run without a scheduler; None is not known.
    """
    if job is not None and job.state is JobState.pending:
        return Standing(RunState.queued, job.reason)
    if job is not None and job.state is JobState.running:
        return _running(history, job)
    if history.submissions and not history.submissions[-1].is_settled and not _cancelled(history):
        return Standing(RunState.queued, "submitted, but the launcher ended before it knew the job; resume finds it")
    return _at_rest(history, job, alive, now)


def _running(history: History, job: JobStatus) -> Standing:
    last = history.last
    if _cancelled(history):  # it still clears its nodes
        return Standing(RunState.cancelled, str(history.decisions[-1].get("reason", "")))
    if last is None or last.claimed_at < (job.started_at or 0.0):
        return Standing(RunState.starting, job.reason or "the job runs, its processes have not claimed an attempt yet")
    if last.ending is None:
        return dataclasses.replace(_active(history, last), why=job.reason)
    if last.ending.outcome is Outcome.done:
        return Standing(RunState.done, "")
    # Why it was stopped, and what it waits for.
    return Standing(RunState.restarting, "; ".join(why for why in (_reason(history, last), job.reason) if why))


def _at_rest(history: History, job: JobStatus | None, alive: bool | None, now: float) -> Standing:
    """What the folder says of a run whose job is over, or unknown, or never was."""
    over = OF_JOB.get(job.state) if job is not None else None
    last, decision = history.last, history.decisions[-1] if history.decisions else {}
    # A submission that became no job has changed nothing.
    asked = max((each.at for each in history.submissions[-1:] if each.handle is not None), default=0.0)
    decided_at = float(decision.get("time") or 0.0)
    newest = decided_at > max(asked, last.claimed_at if last else 0.0)
    if _cancelled(history):
        return Standing(RunState.cancelled, str(decision.get("reason", "")))
    if last is None or last.claimed_at < asked:
        # Another program than our trainer claims nothing: what the batch script decided is the last word on it.
        return _decided(decision) if decided_at > asked and not decision.get("go_on") else _without_attempt(job, over)
    if last.ending is None and over is None and alive:
        return _active(history, last)
    if newest and decision.get("go_on") and over is None and now - decided_at < RESTART_S:
        return Standing(RunState.restarting, str(decision.get("reason", "")))
    if last.ending is not None:
        return Standing(
            OF_OUTCOME[last.ending.outcome], "" if last.ending.outcome is Outcome.done else _reason(history, last)
        )
    if over is not None and job is not None:
        return Standing(over, job.reason)
    if alive is None:
        return Standing(RunState.silent, f"no sign of attempt {last.number} on {last.host or 'its machine'}")
    return Standing(RunState.lost, str(decision.get("reason", "")) if newest else "killed without a word")


def _cancelled(history: History) -> bool:
    """Whether the last thing that happened is that somebody cancelled the run."""
    decision = history.decisions[-1] if history.decisions else {}
    happened = [each.at for each in history.submissions[-1:]] + [each.claimed_at for each in history.attempts[-1:]]
    return decision.get("outcome") == CANCELLED and float(decision.get("time") or 0.0) > max(happened, default=0.0)


def _decided(decision: dict[str, Any]) -> Standing:
    if decision.get("outcome") == Outcome.done.value:
        return Standing(RunState.done, "")
    return Standing(RunState.failed, str(decision.get("reason", "")))


def _without_attempt(job: JobStatus | None, over: RunState | None) -> Standing:
    if job is None:
        return Standing(RunState.new, "nothing has been started")
    if over is not None:
        return Standing(over, job.reason)
    if job.reason:  # it could not be asked
        return Standing(RunState.silent, job.reason)
    return Standing(RunState.lost, "the scheduler does not know the job any more, and it left no attempt")


def _active(history: History, last: Attempt) -> Standing:
    seen = float(history.progress.get("time") or 0.0)
    return Standing(RunState.training if seen > last.claimed_at else RunState.starting)


def _reason(history: History, last: Attempt) -> str:
    """Why the last attempt ended: in the words of the decision that followed, else in its own."""
    decision = history.decisions[-1] if history.decisions else {}
    if float(decision.get("time") or 0.0) > last.claimed_at and decision.get("reason"):
        return str(decision["reason"])
    return (
        "" if last.ending is None else f"{last.ending.outcome.value} at step {last.ending.step}: {last.ending.reason}"
    )

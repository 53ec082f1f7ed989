"""Handle and states of a job, the same for every scheduler."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from everstep.errors import ConfigError

CANCELLED = "cancelled"
"""Outcome in the decision that records a cancelled run."""


class JobState(enum.Enum):
    """State of a job, in terms that hold for every scheduler."""

    pending = "pending"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    preempted = "preempted"
    """Ended by the scheduler in favor of another job; it will not start again by itself."""
    cancelled = "cancelled"
    unknown = "unknown"
    """The scheduler does not know the job, or not any more."""

    @property
    def is_over(self) -> bool:
        return self in (JobState.succeeded, JobState.failed, JobState.preempted, JobState.cancelled)


@dataclass(frozen=True, order=True)
class JobHandle:
    """Address of a job: `slurm://cluster/1234`."""

    scheduler: str
    cluster: str
    id: str

    def __str__(self) -> str:
        return f"{self.scheduler}://{self.cluster}/{self.id}"

    def element(self, number: int) -> JobHandle:
        """Return the handle of one element of this job: `slurm://cluster/1234_7`."""
        return JobHandle(self.scheduler, self.cluster, f"{self.id}_{number}")

    @staticmethod
    def parse(text: str) -> JobHandle:
        scheduler, _, rest = text.partition("://")
        cluster, _, number = rest.partition("/")
        if not (scheduler and cluster and number):
            raise ConfigError(f"{text!r} is not a job: it should look like slurm://cluster/1234")
        return JobHandle(scheduler, cluster, number)


@dataclass(frozen=True)
class JobStatus:
    """Status of a job as reported by the scheduler. Times are seconds since the epoch."""

    state: JobState
    reason: str = ""
    """Reason why the job waits or ended, as reported by the scheduler."""
    nodes: tuple[str, ...] = ()
    restarts: int = 0
    """Number of times the scheduler has started the job again."""
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    ending: bool = False
    """The job is releasing its nodes, and will shortly be over or pending again."""
    worn: str = ""
    """Reason why a new job would start sooner than this one; empty if it would not."""

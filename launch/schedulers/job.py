"""A job as every scheduler has it: a handle that can be written down, and the states that it goes through."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from everstep.errors import ConfigError

CANCELLED = "cancelled"
"""The outcome in a decision of somebody who cancelled the run."""


class JobState(enum.Enum):
    """What has become of a job, in words that hold for every scheduler."""

    pending = "pending"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    preempted = "preempted"
    """Ended by the scheduler for another's sake; it will not start again by itself."""
    cancelled = "cancelled"
    unknown = "unknown"
    """The scheduler does not know it (any more)."""

    @property
    def is_over(self) -> bool:
        return self in (JobState.succeeded, JobState.failed, JobState.preempted, JobState.cancelled)


@dataclass(frozen=True, order=True)
class JobHandle:
    """Where a job is: `slurm://cluster/1234`."""

    scheduler: str
    cluster: str
    id: str

    def __str__(self) -> str:
        return f"{self.scheduler}://{self.cluster}/{self.id}"

    def element(self, number: int) -> JobHandle:
        """One of the jobs that were submitted together as this one: `slurm://cluster/1234_7`."""
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
    """What the scheduler says of a job now. Times are seconds since the epoch."""

    state: JobState
    reason: str = ""
    """Why it waits, or why it ended, in the scheduler's words."""
    nodes: tuple[str, ...] = ()
    restarts: int = 0
    """How often the scheduler has started it again."""
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    ending: bool = False
    """It still clears its nodes, and is over, or waits again, in a moment."""
    worn: str = ""
    """Why a new job would go on sooner than this one; empty where it would not."""

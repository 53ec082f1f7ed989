"""Handle and states of a job, the same for every scheduler."""

from __future__ import annotations

import enum
import os
import re
import uuid
from dataclasses import dataclass

from everstep.errors import ConfigError

PLAIN = re.compile(r"[A-Za-z0-9_%][A-Za-z0-9_.:@%/-]*")
"""Form of a part of a handle."""
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


def new_token(url: str) -> str:
    """Return a unique id of a submission, which ends in a digest of the URL of its run folder or sweep."""
    return f"everstep-{uuid.uuid4().hex[:24]}-{_mark(url)}"


def token_by_hand(url: str) -> str:
    """Return the token of a job that a user applies by hand: the same for each copy of its manifest."""
    return f"by-hand-{uuid.uuid5(uuid.NAMESPACE_URL, url).hex[:24]}-{_mark(url)}"


def is_token_of(token: str, url: str) -> bool:
    """True if a job with this token was submitted for the folder at `url`, or for a sweep around it."""
    parts = _real(url).split("/")
    return any(token.endswith(f"-{_mark('/'.join(parts[:end]))}") for end in range(len(parts), 0, -1))


def _mark(url: str) -> str:
    import hashlib  # imported late, as it loads OpenSSL

    return hashlib.sha256(_real(url).encode()).hexdigest()[:12]


def _real(url: str) -> str:
    """Return a local path without links: a home folder often has two names on a cluster."""
    return os.path.realpath(url) if url.startswith("/") else url


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
        # The parts become arguments of commands: an id like --user=root would cancel all jobs of a user.
        if not all(PLAIN.fullmatch(part) for part in (scheduler, cluster, number)):
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
    token: str = ""
    """Token that the scheduler keeps with the job, see `new_token`; empty if it has none."""
    worn: str = ""
    """Reason why a new job would start sooner than this one; empty if it would not."""


def refuse_other_job(handle: JobHandle, status: JobStatus | None, url: str) -> None:
    """Raise ConfigError if the job that a folder names was not submitted for this folder."""
    if status is None or status.state is JobState.unknown or is_token_of(status.token, url):
        return
    raise ConfigError(
        f"{handle} was not submitted for {url}: this folder was copied, moved or changed; "
        "to end the job all the same, cancel it with the scheduler's own command"
    )

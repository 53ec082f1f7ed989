"""Interface of a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from everstep.launch.config import JobConfig
from everstep.launch.config.job import plain_job
from everstep.launch.schedulers.job import JobHandle, JobStatus
from everstep.storage import join_url

BATCHES = "batches"

Ask = Callable[[Sequence[JobHandle]], dict[JobHandle, JobStatus]]
"""Type of `Scheduler.status`."""


@dataclass(frozen=True)
class Program:
    """Program that runs on each node, and the run folder that it belongs to."""

    name: str
    """Name of the run and of the job."""
    folder: str
    """URL of the run folder."""
    argv: tuple[str, ...]
    """Arguments of Python: `-m everstep.trainer --frozen URL`, or a script with its flags."""
    token: str
    """Unique id of this submission; the scheduler stores it with the job, which can be found by it."""
    config: str = ""
    """Text of the frozen config.yaml, for nodes that mount it; empty if the program is not the trainer."""
    plugins: tuple[str, ...] = ()
    """Packages of the user that the trainer may import."""
    code: str | None = None
    """Snapshot that the nodes run, as returned by `Snapshot.place`; None uses the code on the nodes."""

    @property
    def is_trainer(self) -> bool:
        return self.argv[:2] == ("-m", "everstep.trainer")

    def spec(self, job: JobConfig) -> str:
        """Return the digest of what the nodes run, see `spec_digest`."""
        return spec_digest(job, self.argv, self.code)


def spec_digest(job: JobConfig, argv: Sequence[str], code: str | None) -> str:
    """Return the digest of a job, its program and its code.

    The scheduler keeps it among the arguments of the job, and the nodes compare it with the run folder: a user who can
    only write the folder cannot change what a queued job runs.
    """
    import hashlib  # imported late, as it loads OpenSSL

    usual, given = plain_job(JobConfig()), plain_job(job)
    chosen = {key: given[key] for key in given if given[key] != usual[key]}  # for queued jobs of an earlier version
    text = json.dumps([chosen, list(argv), code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Batch:
    """Runs that are the elements of one job: they differ only in their run folders."""

    name: str
    folder: str
    """URL of the folder that holds all of them, and the list of run folders."""
    token: str
    """As `Program.token`; that of element N is `TOKEN.N`."""
    elements: tuple[int, ...]
    parallel: int
    """Number of elements that run at a time."""
    after: tuple[JobHandle, ...] = ()
    """Jobs that must be over before the first element starts."""
    spec: str = ""
    """Digest of the list of run folders, for the same purpose as `spec_digest`."""

    @property
    def list(self) -> str:
        """URL of the list of run folders: line N, counted from 0, has the URL and `spec_digest` of element N."""
        return join_url(self.folder, BATCHES, f"{self.token}.txt")


@dataclass(frozen=True)
class Rendered:
    """A submission as it would be sent; rendering reads, writes and queries nothing."""

    argv: tuple[str, ...]
    """Command that submits."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files to submit with it, name → text."""
    manifest: str = ""
    """The submission in the form of the scheduler's own tool, which accepts it unchanged."""
    mistakes: tuple[str, ...] = ()
    """Problems that are visible without a query, one line each with the key to change."""


class Scheduler(Protocol):
    """One cluster. User errors, and a controller that stays unreachable after retries, raise ConfigError."""

    def render(self, job: JobConfig, program: Program) -> Rendered:
        """Render a submission; pure: the same job gives the same text."""
        ...

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        """Return what the cluster would refuse or never start, one line each with the key to change.

        `program` is the program to be submitted, if it is known already.
        """
        ...

    def submit(self, rendered: Rendered) -> JobHandle: ...

    def find(self, token: str) -> JobHandle | None:
        """Return the job that was submitted with this token, running or ended; None if there is none.

        The token of a batch gives the job as a whole, that of an element the element.
        """
        ...

    def status(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        """Return the status of all jobs by one query; JobState.unknown for those the scheduler does not know."""
        ...

    def follow(self) -> AbstractContextManager[Ask]:
        """Return `status` for repeated queries: a scheduler that reports changes is watched, not polled."""
        ...

    def cancel(self, handles: Sequence[JobHandle]) -> None:
        """Cancel jobs for good; those that are over stay as they are."""
        ...


@runtime_checkable
class Batching(Scheduler, Protocol):
    """A cluster that takes many runs as one job and enforces `Batch.parallel` by itself.

    An element is a job like any other: `status` and `cancel` take `JobHandle.element` of the handle from `submit`.
    """

    def largest_batch(self) -> int:
        """Return the maximum number of elements of one batch; 0 where batches are disabled."""
        ...

    def render_batch(self, job: JobConfig, batch: Batch) -> Rendered:
        """Render a submission of all elements; pure, like `render`."""
        ...

    def limit(self, handles: Sequence[JobHandle], parallel: int) -> None:
        """Set the number of elements that run at a time, for each batch with an element among `handles`."""
        ...

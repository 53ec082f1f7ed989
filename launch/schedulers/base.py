"""What a cluster has to be able to do, and nothing of how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from everstep.launch.config import JobConfig
from everstep.launch.schedulers.job import JobHandle, JobStatus
from everstep.storage import join_url

BATCHES = "batches"

Ask = Callable[[Sequence[JobHandle]], dict[JobHandle, JobStatus]]
"""`status` of a scheduler."""


@dataclass(frozen=True)
class Program:
    """What each node's torchrun starts, and the run folder that it belongs to."""

    name: str
    """The run's name; also the job's."""
    folder: str
    """URL of the run folder."""
    argv: tuple[str, ...]
    """After `torchrun`'s own flags: `-m everstep.trainer --frozen URL`, or a script with its flags."""
    token: str
    """Names this submission once and for all; the scheduler keeps it with the job, so the job can be found again."""
    config: str = ""
    """Text of the frozen config.yaml, for nodes that are given it; empty for another program than our trainer."""


@dataclass(frozen=True)
class Batch:
    """Runs that are one job with an element for each: they differ in nothing but their folders."""

    name: str
    folder: str
    """URL of the folder that holds all of them, and the list that says which element is which."""
    token: str
    """As a program has one; that of element N is `TOKEN.N`."""
    elements: tuple[int, ...]
    parallel: int
    """Elements at a time."""
    after: tuple[JobHandle, ...] = ()
    """Jobs that have to be over before the first element starts."""

    @property
    def list(self) -> str:
        """URL of a text with the URL of a run folder in each line; element N is line N, counted from 0."""
        return join_url(self.folder, BATCHES, f"{self.token}.txt")


@dataclass(frozen=True)
class Rendered:
    """All that would be handed over: nothing is read, written or asked to make it."""

    argv: tuple[str, ...]
    """The command that submits."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Texts that go along, by name."""
    manifest: str = ""
    """All of it in the form of the scheduler's own tool, which then can be given it as it is."""
    mistakes: tuple[str, ...] = ()
    """What cannot work, as far as it can be seen by looking at it; one line each with the key to change."""


class Scheduler(Protocol):
    """One cluster. Errors of the user are ConfigError in one line; a controller that is away is retried, then ditto."""

    def render(self, job: JobConfig, program: Program) -> Rendered:
        """Pure: the same job gives the same text."""
        ...

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        """What the cluster would refuse or never start, one line each with the key to change.

        `program` is what would be submitted, where that is known already.
        """
        ...

    def submit(self, rendered: Rendered) -> JobHandle: ...

    def find(self, token: str) -> JobHandle | None:
        """The job that was submitted with this token, running or ended; None when there is none.

        By the token of a batch the job as a whole, by that of an element the element.
        """
        ...

    def status(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        """All of them by one query; what the scheduler does not know is JobState.unknown."""
        ...

    def follow(self) -> AbstractContextManager[Ask]:
        """`status` for somebody who asks again and again: a scheduler that can tell what changes is listened to."""
        ...

    def cancel(self, handles: Sequence[JobHandle]) -> None:
        """Stop them for good; those that are over are left as they are."""
        ...


@runtime_checkable
class Batching(Scheduler, Protocol):
    """A cluster that takes many runs at once, and keeps to `Batch.parallel` by itself, whoever watches.

    An element is a job as any other: `status` and `cancel` take `JobHandle.element` of what `submit` has returned.
    """

    def largest_batch(self) -> int:
        """Elements that one batch may have; 0 where batches are switched off."""
        ...

    def render_batch(self, job: JobConfig, batch: Batch) -> Rendered:
        """As `render`, for all of its elements."""
        ...

    def limit(self, handles: Sequence[JobHandle], parallel: int) -> None:
        """From now on so many elements at a time, of each batch that one of these is an element of."""
        ...

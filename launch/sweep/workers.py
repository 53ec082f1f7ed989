"""Interface of the driver to the back end that runs trials: this machine or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from everstep.config import RunConfig
from everstep.errors import EverstepError, SupersededError
from everstep.launch.schedulers.job import JobStatus
from everstep.run_folder import RunFolder


@dataclass(frozen=True)
class Task:
    """One trial up to one rung."""

    trial: int
    folder: RunFolder
    config: RunConfig


@dataclass(frozen=True)
class EndedTrial:
    """A task whose process or job has ended."""

    task: Task
    job: JobStatus | None = None
    code: int | None = None
    """Exit code of a local process."""
    said: str = ""
    """Last line of its output."""


@dataclass(frozen=True)
class Refused:
    """A task that could not be started, and the reason."""

    task: Task
    why: str


def one_by_one(tasks: Sequence[Task], start: Callable[[Task], None]) -> list[Refused]:
    """Start each task, regardless of failures of the others; return those that failed."""
    refused = []
    for task in tasks:
        try:
            start(task)
        except SupersededError:
            raise
        except EverstepError as error:
            refused.append(Refused(task, str(error)))
    return refused


class Workers(Protocol):
    """Back end that runs trials."""

    room: int
    """Capacity: tasks that run at the same time."""

    @property
    def queues(self) -> bool:
        """True if the back end queues tasks beyond its capacity, and starts them even without a driver."""
        ...

    def adopt(self, tasks: list[Task]) -> list[Task]:
        """Follow tasks that an earlier driver has started and that still run; return them."""
        ...

    def start(self, tasks: Sequence[Task]) -> list[Refused]:
        """Start all tasks. ConfigError when all fail for a common reason."""
        ...

    def poll(self) -> list[EndedTrial]:
        """Return tasks that have ended since the last call, by one query for all."""
        ...

    def stop(self, task: Task) -> None:
        """Request one task to save and end; a later `poll` returns it."""
        ...

    def running(self) -> list[Task]:
        """Return all tasks started and not ended, including those in a queue."""
        ...

    def training(self) -> list[Task]:
        """Return the running tasks that are not in a queue, as of the last poll."""
        ...

    def leave(self) -> None:
        """Detach before the driver exits: local processes save and end, jobs continue."""
        ...

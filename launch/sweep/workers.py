"""What a driver needs of a place where trials run: this machine, or a cluster."""

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
class Ended:
    """A task whose process, or job, is gone."""

    task: Task
    job: JobStatus | None = None
    code: int | None = None
    """Exit code of a process of this machine."""
    said: str = ""
    """Its last line."""


@dataclass(frozen=True)
class Refused:
    """A task that could not be started."""

    task: Task
    why: str


def one_by_one(tasks: Sequence[Task], start: Callable[[Task], None]) -> list[Refused]:
    """Start each, whatever becomes of the others."""
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
    """Where trials run."""

    room: int
    """How many tasks it runs at a time."""

    @property
    def queues(self) -> bool:
        """It takes more than it has room for, and starts one whenever another has ended, with a driver or without."""
        ...

    def adopt(self, tasks: list[Task]) -> list[Task]:
        """Those which run already, since an earlier driver has started them: they are followed from now on."""
        ...

    def start(self, tasks: Sequence[Task]) -> list[Refused]:
        """All that may start now. ConfigError when none of them can be had for a reason that all share."""
        ...

    def poll(self) -> list[Ended]:
        """Tasks that have ended since the last call: by one query, however many there are."""
        ...

    def stop(self, task: Task) -> None:
        """Ask one to save and end; `poll` says when it has."""
        ...

    def running(self) -> list[Task]:
        """All that were started, and have not ended: those too that wait in a queue."""
        ...

    def training(self) -> list[Task]:
        """Those of them that do not wait, as far as the last look tells."""
        ...

    def leave(self) -> None:
        """The driver goes. What cannot run without it saves and ends; jobs go on."""
        ...

"""What a driver needs of a place where trials run: this machine, or a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from launch.job import JobStatus
from trainer.config import RunConfig
from trainer.run_folder import RunFolder


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


class Workers(Protocol):
    """Where trials run."""

    room: int
    """How many tasks it takes at a time."""

    def adopt(self, tasks: list[Task]) -> list[Task]:
        """Those which run already, since an earlier driver has started them: they are followed from now on."""
        ...

    def start(self, task: Task) -> None: ...

    def poll(self) -> list[Ended]:
        """Tasks that have ended since the last call: by one query, however many there are."""
        ...

    def stop(self, task: Task) -> None:
        """Ask one to save and end; `poll` says when it has."""
        ...

    def running(self) -> list[Task]: ...

    def leave(self) -> None:
        """The driver goes. What cannot run without it saves and ends; jobs go on."""
        ...

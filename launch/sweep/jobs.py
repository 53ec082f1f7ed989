"""Trials as jobs of a cluster, whichever it is: so many in flight at a time, one question for all of them."""

from __future__ import annotations

import contextlib
import sys
import uuid

from launch.config import JobConfig
from launch.job import JobHandle, JobState, JobStatus
from launch.schedulers.base import Program, Scheduler
from launch.submission import submissions, submit
from launch.supervise import marker
from launch.sweep.code import Code
from launch.sweep.workers import Ended, Task
from launch.torchrun import trainer
from trainer.compose import settle
from trainer.provenance import record

ROOM = 8
"""Jobs in flight where job.max_parallel says nothing."""


class Jobs:
    """Jobs outlive their driver. The next finds them by what their folders say, and never makes a second one."""

    def __init__(self, job: JobConfig, scheduler: Scheduler, code: Code | None = None) -> None:
        self.job = job
        self.code = code
        self.scheduler = scheduler
        self.room = job.max_parallel or ROOM
        self.tasks: dict[JobHandle, Task] = {}
        self._following = contextlib.ExitStack()
        self._ask = self._following.enter_context(scheduler.follow())

    def adopt(self, tasks: list[Task]) -> list[Task]:
        """All that have a job, which may be over: `poll` finds that out, by its one question."""
        found = ((task, submissions(task.folder)) for task in tasks)
        known = {seen[-1].handle: task for task, seen in found if seen}
        self.tasks |= {handle: task for handle, task in known.items() if handle is not None}
        return self.running()

    def start(self, task: Task) -> None:
        settle(task.config, task.folder)
        place = None
        if self.code is not None:
            self.code.give(task.folder)
            place = self.code.place
        record(task.folder, task.config, ["everstep", *sys.argv[1:]], place and place.partition("/")[0])
        url = task.folder.storage.url
        # Names of jobs are letters, digits and few signs on some clusters; the folder's name says what differs.
        program = Program(
            str(task.config.run), url, tuple(trainer(url, task.config.plugins)), f"everstep-{uuid.uuid4().hex}"
        )
        self.tasks[submit(task.folder, self.job, program, self.scheduler, place).handle] = task

    def poll(self) -> list[Ended]:
        if not self.tasks:
            return []
        found = self._ask(list(self.tasks))
        gone = {handle: status for handle, status in found.items() if _is_gone(status)}
        return [Ended(self.tasks.pop(handle), status) for handle, status in gone.items()]

    def stop(self, task: Task) -> None:
        marker(task.folder)("the sweep stops it")

    def running(self) -> list[Task]:
        return list(self.tasks.values())

    def leave(self) -> None:
        """Jobs go on, and the next driver finds them."""
        self._following.close()


def _is_gone(status: JobStatus) -> bool:
    """A scheduler forgets no job that waits or runs."""
    return status.state.is_over or status.state is JobState.unknown

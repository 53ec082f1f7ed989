"""Trials as jobs of a cluster: a limited number in flight, and one query for all of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from everstep.errors import EverstepError
from everstep.frozen_config import settle, start_digest
from everstep.launch.config import JobConfig
from everstep.launch.console import say
from everstep.launch.restart.supervisor import marker
from everstep.launch.schedulers.base import Batch, Batching, Program, Scheduler
from everstep.launch.schedulers.job import JobHandle, JobState, new_token
from everstep.launch.submit.array import ArrayMember, in_threads, recover, submit_batch
from everstep.launch.submit.submission import is_gone, submissions, submit
from everstep.launch.sweep.sweep_folder import Code, SweepFolder
from everstep.launch.sweep.workers import EndedTrial, Refused, Task, one_by_one
from everstep.launch.torchrun import trainer
from everstep.provenance import record, surroundings

ROOM = 8
"""Jobs in flight when job.max_parallel is not set."""


@dataclass(frozen=True)
class _Batches:
    """Batch submission: the scheduler, the folder of the batch lists, and the most tasks of one batch."""

    scheduler: Batching
    sweep: SweepFolder
    largest: int


class ClusterWorkers:
    """Jobs that outlive their driver. The next driver finds them by their run folders: no duplicates.

    On a cluster with batches, tasks are submitted together, and the cluster itself enforces the limit of parallel jobs.
    """

    def __init__(
        self, job: JobConfig, scheduler: Scheduler, code: Code | None = None, sweep: SweepFolder | None = None
    ) -> None:
        self.job = job
        self.code = code
        self.scheduler = scheduler
        self.sweep = sweep
        self.room = job.max_parallel or ROOM
        self.tasks: dict[JobHandle, Task] = {}
        self._begun: set[JobHandle] = set()
        self._adopted = False
        """True if some jobs are from an earlier driver, whose job.max_parallel may have differed."""
        self._following = contextlib.ExitStack()
        self._ask = self._following.enter_context(scheduler.follow())

    @property
    def queues(self) -> bool:
        return self._batches is not None

    @cached_property
    def _batches(self) -> _Batches | None:
        """None when tasks are submitted one by one."""
        if self.sweep is None or not isinstance(self.scheduler, Batching):
            return None
        largest = self.scheduler.largest_batch()
        return _Batches(self.scheduler, self.sweep, largest) if largest > 1 else None

    def adopt(self, tasks: list[Task]) -> list[Task]:
        """Follow all tasks that have a job. Jobs that are over are found by `poll`."""
        recover([task.folder for task in tasks], self.scheduler)
        newest = in_threads(lambda task: [each.handle for each in submissions(task.folder)[-1:]], tasks)
        known = {seen[0]: task for task, seen in zip(tasks, newest, strict=True) if seen}
        self.tasks |= {handle: task for handle, task in known.items() if handle is not None}
        self._adopted = bool(self.tasks)
        return self.running()

    def start(self, tasks: Sequence[Task]) -> list[Refused]:
        batches = self._batches
        if len(tasks) < 2 or batches is None:
            return one_by_one(tasks, self._submit)
        refused = [each for each in in_threads(self._prepared, tasks) if each is not None]
        left_out = {each.task.trial for each in refused}
        ready = [task for task in tasks if task.trial not in left_out]
        for at in range(0, len(ready), batches.largest):
            refused += self._submit_together(ready[at : at + batches.largest], batches)
        return refused

    def _submit(self, task: Task) -> None:
        self._prepare(task)
        url = task.folder.storage.url
        # Some clusters restrict job names to letters, digits and few signs; the folder's name identifies the trial.
        program = Program(
            str(task.config.run),
            url,
            _argv(task),
            new_token(url),
            plugins=tuple(task.config.plugins),
            code=self._place,
        )
        handle = submit(task.folder, self.job, program, self.scheduler).handle
        self.tasks = {each: other for each, other in self.tasks.items() if other.trial != task.trial} | {handle: task}

    def _submit_together(self, tasks: Sequence[Task], to: _Batches) -> list[Refused]:
        """Submit tasks as one job. Beyond capacity it waits for the jobs in flight, without a driver."""
        fits = len(self.tasks) + len(tasks) <= self.room
        batch = Batch(
            to.sweep.name,
            to.sweep.storage.url,
            new_token(to.sweep.storage.url),
            tuple(range(len(tasks))),
            self.room,
            () if fits else tuple(self.tasks),
        )
        members = [ArrayMember(task.folder, _argv(task), tuple(task.config.plugins), self._place) for task in tasks]
        found = submit_batch(batch, members, self.job, to.scheduler)
        told = list(zip(tasks, found, strict=True))
        if handles := [handle for handle in found if isinstance(handle, JobHandle)]:
            say(f"{len(handles)} trials submitted together, {self.room} at a time: {handles[0]} to {handles[-1]}")
        self.tasks |= {handle: task for task, handle in told if isinstance(handle, JobHandle)}
        return [Refused(task, said) for task, said in told if isinstance(said, str)]

    def _prepared(self, task: Task) -> Refused | None:
        try:
            self._prepare(task)
        except EverstepError as error:
            return Refused(task, str(error))
        return None

    def _prepare(self, task: Task) -> None:
        """Write config, code and records into the trial's folder, for its job."""
        settle(task.config, task.folder)
        if self.code is not None:
            self.code.give(task.folder)
        code = None if self._place is None else self._place.partition("/")[0]
        record(task.folder, task.config, ["everstep", *sys.argv[1:]], code, self._surroundings)

    @property
    def _place(self) -> str | None:
        return None if self.code is None else self.code.place

    @cached_property
    def _surroundings(self) -> dict[str, object]:
        return surroundings()

    def poll(self) -> list[EndedTrial]:
        if not self.tasks:
            return []
        found = self._ask(list(self.tasks))
        waiting = [handle for handle, status in found.items() if status.state is JobState.pending]
        if self._adopted and waiting and self._batches is not None:
            self._batches.scheduler.limit(waiting, self.room)
        self._adopted = False
        self._begun = {handle for handle, status in found.items() if status.state is JobState.running}
        for handle in [handle for handle, status in found.items() if status.worn]:
            self._submit(self.tasks[handle])
        gone = {handle: status for handle, status in found.items() if is_gone(status)}
        return [EndedTrial(self.tasks.pop(handle), status) for handle, status in gone.items()]

    def stop(self, task: Task) -> None:
        marker(task.folder)("the sweep stops it")

    def running(self) -> list[Task]:
        return list(self.tasks.values())

    def training(self) -> list[Task]:
        return [task for handle, task in self.tasks.items() if handle in self._begun]

    def leave(self) -> None:
        """Stop following; jobs continue, and the next driver finds them."""
        self._following.close()


def _argv(task: Task) -> tuple[str, ...]:
    return tuple(trainer(task.folder.storage.url, task.config.plugins, start_digest(task.config)))

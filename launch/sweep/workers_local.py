"""Trials on this machine: a limited number of processes, each supervised as by `everstep run`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everstep.config import RunConfig
from everstep.frozen_config import settle
from everstep.import_path import safe_flags
from everstep.launch.config import JobConfig, job_yaml, refuse_too_many
from everstep.launch.config.devices import gpus
from everstep.launch.job_start.child import leash
from everstep.launch.job_start.local_start import SLACK_S
from everstep.launch.restart.supervisor import marker
from everstep.launch.submit.snapshot import search_path
from everstep.launch.submit.trust import Runnable, sign
from everstep.launch.sweep.state import is_alive
from everstep.launch.sweep.sweep_folder import Code
from everstep.launch.sweep.workers import EndedTrial, Refused, Task, one_by_one
from everstep.run_folder import JOB

LOG = "launcher.log"
"""Output of a trial's launcher and trainer, in its folder if that is on a local disk."""


@dataclass
class _Child:
    task: Task
    slot: int
    process: subprocess.Popen[bytes]


class LocalWorkers:
    """Local processes, which die with the driver (even by SIGKILL); the next driver resumes them."""

    queues = False

    def __init__(
        self,
        job: JobConfig,
        config: RunConfig,
        command: Callable[[Task], Sequence[str]] | None = None,
        code: Code | None = None,
    ) -> None:
        self.code = {} if code is None else search_path(code.open(), os.environ.get("PYTHONPATH", ""))
        # By default a trial has one device; the others are for other trials.
        self.nproc: int = job.nproc if isinstance(job.nproc, int) else 1
        config.parallel.check_world(self.nproc)
        refuse_too_many(self.nproc)
        self.devices = _devices()
        fit = max(1, len(self.devices) // self.nproc)
        self.room = job.max_parallel or fit
        share = max(1, len(os.sched_getaffinity(0)) // (self.room * self.nproc))
        self.job = dataclasses.replace(job, nproc=self.nproc, threads=job.threads or share)
        self.command = command or resume_command
        self.children: list[_Child] = []
        self.followed: list[Task] = []
        """Tasks trained by other processes: resumed by a user, or not yet ended after their driver died."""

    def adopt(self, tasks: list[Task]) -> list[Task]:
        self.followed = [task for task in tasks if is_alive(task.folder)]
        return list(self.followed)

    def start(self, tasks: Sequence[Task]) -> list[Refused]:
        return one_by_one(tasks, self._start)

    def _start(self, task: Task) -> None:
        settle(task.config, task.folder)
        sign(task.folder.storage, Runnable.of(self.job, task.config.plugins))
        task.folder.storage.write(JOB, job_yaml(self.job).encode())
        slot = next(n for n in range(self.room + 1) if n not in [child.slot for child in self.children])
        log = task.folder.storage.path(LOG)
        with open(os.devnull if log is None else log, "ab") as output:
            process = subprocess.Popen(
                self.command(task),
                env=self._environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                preexec_fn=leash(os.getpid()),
            )
        self.children.append(_Child(task, slot, process))

    def poll(self) -> list[EndedTrial]:
        over = [child for child in self.children if child.process.poll() is not None]
        self.children = [child for child in self.children if child not in over]
        gone = [task for task in self.followed if not is_alive(task.folder)]
        self.followed = [task for task in self.followed if task not in gone]
        ended = [EndedTrial(child.task, None, child.process.returncode, _last_line(child.task)) for child in over]
        return ended + [EndedTrial(task) for task in gone]

    def stop(self, task: Task) -> None:
        marker(task.folder)("the sweep stops it")
        for child in self.children:
            if child.task.trial == task.trial:
                _signal(child, signal.SIGTERM)

    def running(self) -> list[Task]:
        return [*(child.task for child in self.children), *self.followed]

    def training(self) -> list[Task]:
        return self.running()

    def leave(self) -> None:
        """Send SIGTERM to all, so that they save and end; kill those that exceed the grace period."""
        for child in self.children:
            _signal(child, signal.SIGTERM)
        deadline = time.monotonic() + self.job.grace_s + 2 * SLACK_S
        try:
            for child in self.children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            self.kill()

    def kill(self) -> None:
        for child in self.children:
            _signal(child, signal.SIGKILL)
            child.process.wait()

    def _environment(self, slot: int) -> dict[str, str]:
        """Assign each slot its own devices; with more slots than devices they are shared."""
        base = {**os.environ, **self.code}
        if not self.devices:
            return base
        mine = [self.devices[(slot * self.nproc + n) % len(self.devices)] for n in range(self.nproc)]
        return {**base, "CUDA_VISIBLE_DEVICES": ",".join(mine)}


def resume_command(task: Task) -> list[str]:
    """Return `everstep resume` of the trial's folder, which composes nothing and refuses a run under way."""
    plugins = [f"plugins=[{','.join(task.config.plugins)}]"] if task.config.plugins else []
    return [sys.executable, *safe_flags(), "-m", "everstep.launch", "resume", task.folder.storage.url, *plugins]


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(gpus())]


def _signal(child: _Child, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.process.pid, number)


def _last_line(task: Task) -> str:
    path = task.folder.storage.path(LOG)
    if path is None or not path.exists():
        return ""
    lines = [line for line in path.read_text(errors="replace")[-4000:].splitlines() if line.strip()]
    return lines[-1] if lines else ""

"""Slurm through its command-line tools: one sbatch for a job or an array, one squeue for all jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Ask, Batch, Program, Rendered
from everstep.launch.schedulers.job import JobHandle, JobState, JobStatus
from everstep.launch.schedulers.slurm.commands import RETRY_S, Answer, ask
from everstep.launch.schedulers.slurm.sbatch import array_command, job_command
from everstep.security.job_secrets import TOKEN, check_token, new_secret

if TYPE_CHECKING:
    from everstep.launch.schedulers.slurm import jobs_json


@dataclass(frozen=True)
class Slurm:
    """Slurm cluster that the commands on this machine talk to."""

    retry_s: float = RETRY_S

    def render(self, job: JobConfig, program: Program) -> Rendered:
        return job_command(job, program)

    def largest_batch(self) -> int:
        """Return the lower of two limits: MaxArraySize and max_array_tasks."""
        config = self._config()
        found = re.search(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
        size = int(config.get("MaxArraySize", "0"))
        return min(size, int(found[1])) if found else size

    def render_batch(self, job: JobConfig, batch: Batch) -> Rendered:
        return array_command(job, batch)

    def limit(self, handles: Sequence[JobHandle], parallel: int) -> None:
        for array in dict.fromkeys(handle.id.partition("_")[0] for handle in handles if "_" in handle.id):
            done = self._ask("scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={parallel}")
            if done.code:
                raise ConfigError(f"scontrol update JobId={array}: {done.last_line}")

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        """Return problems from partitions and nodes, then from `sbatch --test-only`; nothing is submitted."""
        from everstep.launch.schedulers.slurm.preflight import problems

        return problems(job, lambda argv: self._ask(*argv))

    def submit(self, rendered: Rendered) -> JobHandle:
        # sbatch keeps the environment with the job, over requeues, where other users cannot read it.
        secret = check_token(os.environ[TOKEN]) if TOKEN in os.environ else new_secret()
        done = self._ask(*rendered.argv, **{TOKEN: secret})
        if done.code:
            raise ConfigError(f"sbatch refused the job: {done.last_line}")
        number, _, cluster = done.out.strip().partition(";")
        return JobHandle("slurm", cluster or self._cluster(), number)

    def find(self, token: str) -> JobHandle | None:
        comment, _, element = token.partition(".")
        # All elements of an array have its comment.
        known = next(((job.cluster, job.id) for job in self._jobs() if job.comment == comment), None)
        known = known or self._find_in_accounting(comment)
        if known is None:
            return None
        job = JobHandle("slurm", known[0] or self._cluster(), known[1].partition("_")[0])
        return job.element(int(element)) if element else job

    def status(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        if not handles:
            return {}
        known = {job.id: job.status for job in self._jobs()}
        forgotten = [handle for handle in handles if handle.id not in known]
        if forgotten:
            known |= self._accounted(forgotten)
        return {handle: known.get(handle.id, JobStatus(JobState.unknown)) for handle in handles}

    def follow(self) -> AbstractContextManager[Ask]:
        return nullcontext(self.status)  # Slurm cannot report changes

    def cancel(self, handles: Sequence[JobHandle]) -> None:
        if not handles:
            return
        done = self._ask("scancel", *(handle.id for handle in handles))
        # For jobs that are over Slurm reports in one of several forms that there is nothing to cancel.
        said = [
            line
            for line in done.err.splitlines()
            if line and "Invalid job id" not in line and "already complet" not in line
        ]
        if done.code and said:
            raise ConfigError(f"scancel: {said[0]}")

    def _jobs(self) -> list[jobs_json.Job]:
        """Return all jobs of this user that the controller remembers, by one query."""
        from everstep.launch.schedulers.slurm import jobs_json

        # Without the variable, squeue truncates a long list of pending elements.
        done = self._ask("squeue", "--me", "--states=all", "--json", SLURM_BITSTR_LEN="0")
        if done.code:
            raise ConfigError(f"squeue does not answer: {done.last_line}")
        return jobs_json.jobs(done.out)

    def _find_in_accounting(self, comment: str) -> tuple[str, str] | None:
        """Return cluster and number of the job with this comment; None if there is none."""
        for line in self._sacct("--format=JobID,Cluster,Comment%120", "--starttime=now-30days"):
            number, cluster, said = [*line.split("|"), "", ""][:3]
            if said == comment:
                return cluster, number
        return None

    def _accounted(self, handles: Sequence[JobHandle]) -> dict[str, JobStatus]:
        """Return the statuses of jobs that only accounting still has; empty if it is off."""
        from everstep.launch.schedulers.slurm import jobs_json

        ids = ",".join(handle.id for handle in handles)
        rows = self._sacct(f"--jobs={ids}", f"--format={jobs_json.SACCT_FIELDS}")
        return dict(jobs_json.accounted(row) for row in rows)

    def _sacct(self, *arguments: str) -> list[str]:
        done = self._ask("sacct", "--allocations", "--noheader", "--parsable2", *arguments)
        return done.out.splitlines() if done.code == 0 else []

    def _cluster(self) -> str:
        """Return the cluster's name, which does not change during our lifetime."""
        return self._config().get("ClusterName", "cluster")

    def _config(self) -> dict[str, str]:
        lines = self._ask("scontrol", "show", "config").out.splitlines()
        pairs = (line.split("=", 1) for line in lines if "=" in line)
        return {key.strip(): value.strip() for key, value in pairs}

    def _ask(self, *argv: str, **more: str) -> Answer:
        return ask(argv, self.retry_s, **more)

"""Slurm through its command-line tools: one sbatch for a job or an array, one squeue for all jobs."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import everstep
from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.config.job import NOTICE_SLACK_S
from everstep.launch.console import say
from everstep.launch.schedulers.base import BATCHES, Ask, Batch, Program, Rendered
from everstep.launch.schedulers.job import JobHandle, JobState, JobStatus
from everstep.storage import join_url, open_storage

if TYPE_CHECKING:
    from everstep.launch.schedulers.slurm import jobs_json

SCRIPT = "run.sbatch"
AWAY = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "connect failure",
    "Connection refused",
    "Transport endpoint is not connected",
    "backup controller in standby mode",
)
"""Error texts of Slurm's commands for an unreachable controller, not an invalid request."""
RETRY_S = 60.0
"""Seconds for which a command is retried while the controller is unreachable."""
TIMEOUT_S = 120.0


def script() -> Path:
    """Return the path of run.sbatch."""
    return Path(everstep.__file__).parent / "slurm" / SCRIPT


@dataclass(frozen=True)
class Slurm:
    """Slurm cluster that the commands on this machine talk to."""

    retry_s: float = RETRY_S

    def render(self, job: JobConfig, program: Program) -> Rendered:
        flags = _flags(job, program.name, program.token, _output(program))
        return _rendered(flags, _arguments(job, program.folder, program.folder))

    def largest_batch(self) -> int:
        """Return the lower of two limits: MaxArraySize and max_array_tasks."""
        config = self._config()
        found = re.search(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
        size = int(config.get("MaxArraySize", "0"))
        return min(size, int(found[1])) if found else size

    def render_batch(self, job: JobConfig, batch: Batch) -> Rendered:
        array = [f"--array={spans(batch.elements)}%{batch.parallel}"]
        if batch.after:
            arrays = dict.fromkeys(handle.id.partition("_")[0] for handle in batch.after)
            array.append(f"--dependency=afterany:{':'.join(arrays)}")
        flags = _flags(job, batch.name, batch.token, _output_of_batch(batch))
        return _rendered([*array, *flags], _arguments(job, batch.list, batch.folder))

    def limit(self, handles: Sequence[JobHandle], parallel: int) -> None:
        for array in dict.fromkeys(handle.id.partition("_")[0] for handle in handles if "_" in handle.id):
            done = self._ask("scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={parallel}")
            if done.returncode:
                raise ConfigError(f"scontrol update JobId={array}: {_last_line(done.stderr)}")

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        """Return problems from partitions and nodes, then from `sbatch --test-only`; nothing is submitted."""
        from everstep.launch.schedulers.slurm.preflight import Answer, problems

        def answer(argv: Sequence[str]) -> Answer:
            done = self._ask(*argv)
            return Answer(done.returncode, done.stdout, done.stderr)

        flags = [flag for flag in _flags(job, "everstep-check", "", "") if not flag.startswith("--output")]
        return problems(job, answer, flags)

    def submit(self, rendered: Rendered) -> JobHandle:
        done = self._ask(*rendered.argv)
        if done.returncode:
            raise ConfigError(f"sbatch refused the job: {_last_line(done.stderr)}")
        number, _, cluster = done.stdout.strip().partition(";")
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
            for line in done.stderr.splitlines()
            if line and "Invalid job id" not in line and "already complet" not in line
        ]
        if done.returncode and said:
            raise ConfigError(f"scancel: {said[0]}")

    def _jobs(self) -> list[jobs_json.Job]:
        """Return all jobs of this user that the controller remembers, by one query."""
        from everstep.launch.schedulers.slurm import jobs_json

        # Without the variable, squeue truncates a long list of pending elements.
        done = self._ask("squeue", "--me", "--states=all", "--json", SLURM_BITSTR_LEN="0")
        if done.returncode:
            raise ConfigError(f"squeue does not answer: {_last_line(done.stderr)}")
        return jobs_json.jobs(done.stdout)

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
        return done.stdout.splitlines() if done.returncode == 0 else []

    def _cluster(self) -> str:
        """Return the cluster's name, which does not change during our lifetime."""
        return self._config().get("ClusterName", "cluster")

    def _config(self) -> dict[str, str]:
        lines = self._ask("scontrol", "show", "config").stdout.splitlines()
        pairs = (line.split("=", 1) for line in lines if "=" in line)
        return {key.strip(): value.strip() for key, value in pairs}

    def _ask(self, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command, retrying with growing pauses while the controller is unreachable.

        `more`: additional environment variables.
        """
        pause, deadline = 0.5, time.monotonic() + self.retry_s
        while True:
            try:
                done = subprocess.run(
                    argv,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_S,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    env=_environment() | more,
                )
            except FileNotFoundError as error:
                raise ConfigError(
                    f"job=slurm needs Slurm's commands, and there is no {argv[0]} here; submit on a login node"
                ) from error
            except subprocess.TimeoutExpired as error:
                raise ConfigError(f"{argv[0]} gave no answer within {TIMEOUT_S:.0f} s") from error
            away = done.returncode != 0 and any(words in done.stderr for words in AWAY)
            # An sbatch without an answer may have been accepted all the same: a retry could create two jobs.
            if not away or argv[0] == "sbatch" or time.monotonic() + pause > deadline:
                return done
            _say_away(_last_line(done.stderr))
            time.sleep(pause)
            pause = min(10.0, 2 * pause)


@functools.cache
def _say_away(why: str) -> None:
    """Report once that the controller is unreachable."""
    say(f"waiting for Slurm's controller: {why}")


def _environment() -> dict[str, str]:
    """Return the environment without SLURM_ARRAY_*: sbatch would pass these on to a job that is no array."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}


def _rendered(flags: Sequence[str], arguments: Sequence[str]) -> Rendered:
    return Rendered(("sbatch", "--parsable", *flags, str(script()), *arguments), {SCRIPT: script().read_text()})


def spans(numbers: Sequence[int]) -> str:
    """Return the elements of an array in Slurm's form, such as 0-3,5."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] == number - 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, span)) for span in found)


def _flags(job: JobConfig, name: str, token: str, output: str) -> list[str]:
    fewest, most = job.node_range
    given: list[tuple[str, object]] = [
        ("job-name", name),
        ("comment", token),
        ("nodes", fewest if fewest == most else f"{fewest}-{most}"),
        ("time", _minutes(job.time_s)),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("constraint", job.constraint),
        ("reservation", job.reservation),
        ("exclude", ",".join(job.exclude) or None),
        ("gpus-per-node", _gpus(job)),
        ("cpus-per-task", job.cpus),
        ("mem", job.mem),
        ("signal", f"B:USR1@{job.grace_s + NOTICE_SLACK_S}"),
        ("output", output),
    ]
    return [*(f"--{name}={value}" for name, value in given if value not in (None, "")), *job.flags]


def _arguments(job: JobConfig, what: str, folder: str) -> list[str]:
    """Return the script's arguments: the run folder or a list of them, and the options for its Python.

    Args:
        folder: folder that a container must see.
    """
    options = [("--python", job.python or sys.executable), *(("--setup", line) for line in job.setup)]
    if job.image is not None:
        options += _container(job, folder)
    return [what, *(word for option in options for word in option)]


def _container(job: JobConfig, folder: str) -> list[tuple[str, str]]:
    folders = [os.getcwd(), *([folder] if open_storage(folder).path() is not None else [])]
    mounts = [*job.mounts, *(f"{each}:{each}" for each in folders)]
    if job.runtime == "pyxis":
        flags = [
            f"--container-image={job.image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={os.getcwd()}",
            "--no-container-mount-home",
        ]
        return [("--srun", flag) for flag in flags]
    words = [
        "apptainer",
        "exec",
        *(["--nv"] if job.gpus != 0 else []),
        "--bind",
        ",".join(mounts),
        "--pwd",
        os.getcwd(),
        str(job.image),
    ]
    return [("--within", word) for word in words]


def _gpus(job: JobConfig) -> int | None:
    """Return the GPUs per node; None requests none: a node that is allocated as a whole has its own."""
    if job.gpus == "auto":
        return job.nproc if isinstance(job.nproc, int) else None
    return int(job.gpus) or None


def _minutes(time_s: int | None) -> int | None:
    """Return minutes, rounded up, for Slurm's time limits."""
    return None if time_s is None else -(-time_s // 60)


def _output(program: Program) -> str:
    """Return the output file: in a local run folder, else in the folder of submission."""
    folder = open_storage(program.folder).path()
    return f"{folder}/slurm-%j.out" if folder is not None else f"{program.name}-%j.out"


def _output_of_batch(batch: Batch) -> str:
    """Return the output file of all elements, used until each has found its run folder and writes there."""
    folder = open_storage(join_url(batch.folder, BATCHES)).path()
    return f"{folder}/slurm-%A.out" if folder is not None else f"{batch.name}-%A_%a.out"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"

"""The sbatch command of a job or an array: flags, output file, arguments of run.sbatch. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import everstep
from everstep.launch.config import JobConfig
from everstep.launch.config.job import NOTICE_SLACK_S
from everstep.launch.schedulers.base import BATCHES, Batch, Program, Rendered
from everstep.storage import join_url, open_storage

SCRIPT = "run.sbatch"


def script() -> Path:
    """Return the path of run.sbatch."""
    return Path(everstep.__file__).parent / "slurm" / SCRIPT


def job_command(job: JobConfig, program: Program) -> Rendered:
    flags = [*_labels(program.name, program.token, _output(program)), *request_flags(job)]
    return _rendered(flags, _arguments(job, program.folder, program.folder, program.spec(job)))


def array_command(job: JobConfig, batch: Batch) -> Rendered:
    array = [f"--array={spans(batch.elements)}%{batch.parallel}"]
    if batch.after:
        arrays = dict.fromkeys(handle.id.partition("_")[0] for handle in batch.after)
        array.append(f"--dependency=afterany:{':'.join(arrays)}")
    flags = [*array, *_labels(batch.name, batch.token, _output_of_batch(batch)), *request_flags(job)]
    return _rendered(flags, _arguments(job, batch.list, batch.folder, batch.spec))


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


def _labels(name: str, token: str, output: str) -> list[str]:
    return [f"--job-name={name}", f"--comment={token}", f"--output={output}"]


def request_flags(job: JobConfig) -> list[str]:
    """Return the sbatch flags for what the job requests, which `sbatch --test-only` can judge."""
    fewest, most = job.node_range
    given: list[tuple[str, object]] = [
        ("nodes", fewest if fewest == most else f"{fewest}-{most}"),
        ("time", _minutes(job.time_s)),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("constraint", job.constraint),
        ("reservation", job.reservation),
        ("exclude", ",".join(job.exclude) or None),
        ("gpus-per-node", gpus_per_node(job)),
        ("cpus-per-task", job.cpus),
        ("mem", job.mem),
        ("signal", f"B:USR1@{job.grace_s + NOTICE_SLACK_S}"),
    ]
    return [*(f"--{name}={value}" for name, value in given if value not in (None, "")), *job.flags]


def _arguments(job: JobConfig, what: str, folder: str, spec: str) -> list[str]:
    """Return the script's arguments: the run folder or a list of them, and the options for its Python.

    Args:
        folder: folder that a container must see.
        spec: digest that the nodes compare with the run folder.
    """
    options = [
        *([("--spec", spec)] if spec else []),
        ("--python", job.python or sys.executable),
        *(("--setup", line) for line in job.setup),
    ]
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


def gpus_per_node(job: JobConfig) -> int | None:
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

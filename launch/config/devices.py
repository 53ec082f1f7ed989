"""Processes and CPU threads per machine."""

from __future__ import annotations

import os
import shutil
import subprocess

from everstep.errors import ConfigError
from everstep.launch.config.job import JobConfig

PER_CORE = 16
"""Limit of processes per core of this machine: more are taken for a mistake and would overload it."""


def refuse_too_many(nproc: int) -> None:
    """Raise ConfigError before more processes are started than this machine can run."""
    cores = len(os.sched_getaffinity(0))
    if nproc > PER_CORE * cores:
        raise ConfigError(
            f"job.nproc={nproc} is over {PER_CORE} processes for each of this machine's {cores} cores; lower job.nproc"
        )


def processes(job: JobConfig) -> int:
    """Return the number of processes to start on this machine."""
    return job.nproc if isinstance(job.nproc, int) else max(1, gpus())


def threads(job: JobConfig, nproc: int) -> int:
    """Return the CPU threads of each process: from the config, else the shell, else a share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if job.threads is None and asked.isdigit() and int(asked) >= 1:
        return int(asked)
    return job.threads or max(1, len(os.sched_getaffinity(0)) // nproc)


def gpus() -> int:
    """Return the number of GPUs visible to a process here; nvidia-smi takes 50 ms, torch takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())

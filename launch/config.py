"""What a job is: where and how often processes are started. The trainer knows none of these keys."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config import require
from trainer.errors import ConfigError, nearest

SCHEDULERS = ("local",)
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


@dataclass(kw_only=True)
class JobConfig:
    scheduler: str = "local"
    """Who starts the processes; `local` is this machine, now."""
    nproc: int | str = "auto"
    """Processes on each machine; `auto` is one for each GPU, or one where there is none."""
    max_restarts: int = 3
    """Starts in a row, after the first, that may end without a new checkpoint before the launcher gives up."""
    grace_s: int = 60
    """Seconds that processes have to save and end once they were told to stop."""
    threads: int | None = None
    """CPU threads of each process (OMP_NUM_THREADS); null shares the cores among the processes."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for the processes, on top of those that the launcher has."""

    def __post_init__(self) -> None:
        require(self.scheduler in SCHEDULERS, "job.scheduler", self.scheduler, f"must be {' or '.join(SCHEDULERS)}")
        auto_or_count = self.nproc == "auto" if isinstance(self.nproc, str) else self.nproc >= 1
        require(auto_or_count, "job.nproc", self.nproc, "must be ≥ 1 or auto")
        require(self.max_restarts >= 0, "job.max_restarts", self.max_restarts, "must be ≥ 0")
        require(self.grace_s >= 0, "job.grace_s", self.grace_s, "must be ≥ 0")
        require(self.threads is None or self.threads >= 1, "job.threads", self.threads, "must be ≥ 1 or null")
        for name in self.env:
            # job.yaml lies in the run folder, where more people read than may know the secret; its value is not shown.
            secret = any(word in name.upper() for word in SECRET_WORDS)
            require(not secret, f"job.env.{name}", "…", "looks like a secret; export it in the shell instead")


def job_config(node: Mapping[str, Any]) -> JobConfig:
    """The typed job from what the command line composed; ConfigError in one line for what does not fit."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [f.name for f in dataclasses.fields(JobConfig)]
    for key in node:
        if key not in known:
            raise ConfigError(f"no key 'job.{key}'{nearest(f'job.{key}', [f'job.{name}' for name in known])}")
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JobConfig), dict(node)))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    if not isinstance(job, JobConfig):
        raise ConfigError(f"job={node!r}: must be a group of keys")
    return job


def job_yaml(job: JobConfig) -> str:
    import yaml

    text: str = yaml.safe_dump(dataclasses.asdict(job), sort_keys=False)
    return text


def processes(job: JobConfig) -> int:
    """How many processes to start on this machine."""
    return job.nproc if isinstance(job.nproc, int) else max(1, _gpus())


def threads(job: JobConfig, nproc: int) -> int:
    """CPU threads of each process: what was asked for, in the config or in the shell, or a fair share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if job.threads is None and asked.isdigit() and int(asked) >= 1:
        return int(asked)
    return job.threads or max(1, len(os.sched_getaffinity(0)) // nproc)


def _gpus() -> int:
    """GPUs that a process started here would see. nvidia-smi answers in 50 ms; asking torch would cost seconds."""
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


def _one_line(error: BaseException) -> str:
    """The first line of OmegaConf's message, with the key that it is about."""
    lines = [line.strip() for line in str(error).splitlines()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return f"job.{key}: {lines[0]}" if key else lines[0]

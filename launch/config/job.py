"""All keys of a job."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.config import meant, require
from everstep.errors import ConfigError
from everstep.launch.config.failure_patterns import CauseConfig, known_causes
from everstep.launch.config.kubernetes import KubernetesConfig
from everstep.launch.config.parsing import node_range, seconds

SCHEDULERS = ("local", "slurm", "k8s")
KINDS = ("job", "jobset", "trainjob")
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
NOTICE_SLACK_S = 30
"""Seconds beyond the grace at which a scheduler is asked to give notice: killing, deciding and requeueing take some."""


@dataclass(kw_only=True)
class JobConfig:
    scheduler: str = "local"
    """Who starts the processes; `local` is this machine, now."""
    nodes: int | str = 1
    """Machines; "MIN:MAX" takes what comes between the two, anew at each start."""
    nproc: int | str = "auto"
    """Processes on each machine; `auto` is one for each GPU, or one where there is none."""
    time: str | None = None
    """Longest time of one start: 24h, 90m, 1d12h or Slurm's 1-12:00:00; null is what the partition gives."""
    max_restarts: int = 3
    """Starts in a row, after the first, that may end without a new checkpoint before the launcher gives up."""
    grace_s: int = 60
    """Seconds that processes have to save and end once they were told to stop."""
    threads: int | None = None
    """CPU threads of each process (OMP_NUM_THREADS); null shares the cores among the processes."""
    max_parallel: int | None = None
    """Trials of a sweep at a time; null is what the GPUs here are enough for (one without), and 8 on a cluster."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for the processes, on top of those that the launcher has."""
    secrets: list[str] = field(default_factory=list)
    """Names of environment variables that have to reach the processes; their values are written nowhere."""
    code_mb: int = 100
    """Size that the code which goes along may have, before compression: the checkout without what git ignores."""
    interface: str | None = None
    """Network interface for gloo, NCCL and the rendezvous (ib0, eth0); null is the one of the node's own name."""
    check_s: int = 60
    """Seconds that the checks of a node may take before training; a node that is slower counts as bad."""
    causes: dict[str, CauseConfig | None] = field(default_factory=dict)
    """What lines of output say about why a job failed, before the causes that we know; null drops one of ours."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have, in the scheduler's own syntax."""
    reservation: str | None = None
    exclude: list[str] = field(default_factory=list)
    """Nodes that must not be used."""
    gpus: int | str = "auto"
    """GPUs on each node; `auto` is as many as nproc, and leaves it to the scheduler where nproc is auto too."""
    cpus: int | None = None
    """CPUs on each node; null is what the scheduler gives."""
    mem: str | None = None
    """Memory on each node, as Slurm says it (64G, 0 for all); null is what the scheduler gives."""
    flags: list[str] = field(default_factory=list)
    """Further flags of sbatch, such as --exclusive or --mail-type=END."""

    python: str | None = None
    """The Python that has Everstep, as the nodes see it; null is the one that submits."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run before anything else, such as `module load cuda/12.4`."""
    image: str | None = None
    """Container image: an enroot image or registry address for pyxis, a .sif file for apptainer; null runs without."""
    runtime: str = "pyxis"
    """What runs the image: pyxis or apptainer."""
    mounts: list[str] = field(default_factory=list)
    """SOURCE:TARGET pairs that the container sees; the folder of submission and a local run folder are added."""

    kind: str = "job"
    """What Kubernetes is given: job (nothing has to be installed), jobset or trainjob."""
    queue: str | None = None
    """Kueue's LocalQueue; the job then starts when all of its pods have a place."""
    k8s: KubernetesConfig = field(default_factory=KubernetesConfig)

    def __post_init__(self) -> None:
        require(self.scheduler in SCHEDULERS, "job.scheduler", self.scheduler, f"must be {' or '.join(SCHEDULERS)}")
        _fits("job.nodes", self.nodes, lambda: node_range(self.nodes))
        require(_auto_or(1, self.nproc), "job.nproc", self.nproc, "must be ≥ 1 or auto")
        require(_auto_or(0, self.gpus), "job.gpus", self.gpus, "must be ≥ 0 or auto")
        require(self.max_restarts >= 0, "job.max_restarts", self.max_restarts, "must be ≥ 0")
        require(self.max_parallel is None or self.max_parallel >= 1, "job.max_parallel", self.max_parallel,
                "must be ≥ 1 or null")  # fmt: skip
        require(self.grace_s >= 0, "job.grace_s", self.grace_s, "must be ≥ 0")
        require(self.code_mb >= 1, "job.code_mb", self.code_mb, "must be ≥ 1")
        require(self.check_s >= 1, "job.check_s", self.check_s, "must be ≥ 1")
        require(self.threads is None or self.threads >= 1, "job.threads", self.threads, "must be ≥ 1 or null")
        require(self.cpus is None or self.cpus >= 1, "job.cpus", self.cpus, "must be ≥ 1 or null")
        require(self.runtime in ("pyxis", "apptainer"), "job.runtime", self.runtime, "must be pyxis or apptainer")
        require(self.kind in KINDS, "job.kind", self.kind, f"must be {', '.join(KINDS)}")
        if self.time is not None:
            _fits("job.time", self.time, lambda: seconds(str(self.time)))
            least = self.grace_s + NOTICE_SLACK_S
            rule = f"must be longer than job.grace_s + {NOTICE_SLACK_S} = {least} s, which a stop may take"
            require(seconds(self.time) > least, "job.time", self.time, rule)
        for flag in self.flags:
            require(flag.startswith("-"), "job.flags", flag, "must start with '-'")
        self._check_secrets()

    def _check_secrets(self) -> None:
        for name in self.env:
            # job.yaml lies in the run folder, where more people read than may know the secret; its value is not shown.
            secret = any(word in name.upper() for word in SECRET_WORDS)
            rule = "looks like a secret; export it in the shell, and name it in job.secrets"
            require(not secret, f"job.env.{name}", "…", rule)
        for name in self.secrets:
            is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None
            require(is_name, "job.secrets", "…", "takes names of environment variables, never their values")

    @property
    def time_s(self) -> int | None:
        """The time limit of one start in seconds."""
        return None if self.time is None else seconds(self.time)

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        return node_range(self.nodes)

    def all_causes(self) -> dict[str, CauseConfig]:
        """The user's and ours, in the order in which they are looked for."""
        merged = {**self.causes, **{name: cause for name, cause in known_causes().items() if name not in self.causes}}
        return {name: cause for name, cause in merged.items() if cause is not None}


def _auto_or(least: int, value: int | str) -> bool:
    return value == "auto" if isinstance(value, str) else value >= least


def _fits(key: str, value: object, check: Any) -> None:
    try:
        check()
    except ValueError as error:
        require(False, key, value, str(error))


def job_config(node: Mapping[str, Any]) -> JobConfig:
    """The typed job from what the command line composed; ConfigError in one line for what does not fit."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [f.name for f in dataclasses.fields(JobConfig)]
    for key in node:
        if key not in known:
            raise ConfigError(f"no key 'job.{key}'{meant(f'job.{key}', [f'job.{name}' for name in known])}")
    try:
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JobConfig), dict(node)))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    if not isinstance(job, JobConfig):
        raise ConfigError(f"job={node!r}: must be a group of keys")
    return job


def job_yaml(job: JobConfig) -> str:
    import yaml

    text: str = yaml.safe_dump(_plain(dataclasses.asdict(job)), sort_keys=False, allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def _one_line(error: BaseException) -> str:
    """The first line of OmegaConf's message, with the key that it is about."""
    lines = [line.strip() for line in str(error).splitlines()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return f"job.{key}: {lines[0]}" if key else lines[0]

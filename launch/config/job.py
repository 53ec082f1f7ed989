"""Config keys of a job."""

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
from everstep.launch.config.notify import NotifyConfig
from everstep.launch.config.parsing import node_range, seconds
from everstep.security.secret_detection import has_secret, is_secret_name

SCHEDULERS = ("local", "slurm", "k8s")
KINDS = ("job", "jobset", "trainjob")
NOTICE_SLACK_S = 30
"""Seconds of notice beyond the grace period: for the kill, the decision and the requeue."""


@dataclass(kw_only=True)
class JobConfig:
    scheduler: str = "local"
    """Scheduler that starts the processes; `local` is this machine, now."""
    nodes: int | str = 1
    """Machines; "MIN:MAX" takes any number between the two, chosen anew at each start."""
    nproc: int | str = "auto"
    """Processes on each machine; `auto` is one for each GPU, or one where there is none."""
    time: str | None = None
    """Time limit of one start: 24h, 90m, 1d12h or Slurm's 1-12:00:00; null is the partition's default."""
    max_restarts: int = 3
    """Restarts in a row without a new checkpoint after which the launcher gives up."""
    grace_s: int = 60
    """Grace period: seconds that processes have to save and end after a request to stop."""
    warm: bool = True
    """Fork the ranks of every start from one process that has imported torch; false: new processes."""
    threads: int | None = None
    """CPU threads of each process (OMP_NUM_THREADS); null shares the cores among the processes."""
    max_parallel: int | None = None
    """Trials of a sweep at a time; null is as many as the local GPUs allow (one without), 8 on a cluster."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for the processes, in addition to the launcher's own."""
    secrets: list[str] = field(default_factory=list)
    """Names of environment variables to pass to the processes; their values are stored nowhere."""
    code_keep: list[str] = field(default_factory=list)
    """Patterns of files that the code snapshot takes although they look like secrets."""
    code_mb: int = 100
    """Limit in MB of the code snapshot before compression: the checkout without files that git ignores."""
    interface: str | None = None
    """Network interface for gloo, NCCL and rendezvous (ib0, eth0); null is that of the node's own name."""
    check_s: int = 60
    """Seconds that the checks of a node may take before training; a slower node counts as bad."""
    causes: dict[str, CauseConfig | None] = field(default_factory=dict)
    """Failure causes by name, checked before the built-in ones; null disables a built-in one."""

    notify: NotifyConfig = field(default_factory=NotifyConfig)
    """Command or webhook that is told of the end, failures, stalls, standstill and new bests of a run."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have, in the scheduler's own syntax."""
    reservation: str | None = None
    exclude: list[str] = field(default_factory=list)
    """Nodes to exclude."""
    gpus: int | str = "auto"
    """GPUs on each node; `auto` is nproc, or the scheduler's default where nproc is auto too."""
    cpus: int | None = None
    """CPUs on each node; null is the scheduler's default."""
    mem: str | None = None
    """Memory on each node in Slurm's form (64G, 0 for all); null is the scheduler's default."""
    flags: list[str] = field(default_factory=list)
    """Further flags of sbatch, such as --exclusive or --mail-type=END."""

    python: str | None = None
    """Path of the Python with Everstep, as seen from the nodes; null is the submitting one."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run before anything else, such as `module load cuda/12.4`."""
    image: str | None = None
    """Container image: enroot image or registry address (pyxis), .sif file (apptainer); null is none."""
    runtime: str = "pyxis"
    """Container runtime: pyxis or apptainer."""
    mounts: list[str] = field(default_factory=list)
    """SOURCE:TARGET mounts of the container; the submission folder and a local run folder are added."""

    kind: str = "job"
    """Kubernetes object to create: job (nothing to install), jobset or trainjob."""
    queue: str | None = None
    """Kueue's LocalQueue; the job then starts when all of its pods are admitted."""
    k8s: KubernetesConfig = field(default_factory=KubernetesConfig)

    def __post_init__(self) -> None:
        require(self.scheduler in SCHEDULERS, "job.scheduler", self.scheduler, f"must be {' or '.join(SCHEDULERS)}")
        _fits("job.nodes", self.nodes, lambda: node_range(self.nodes))
        require(_auto_or(1, self.nproc), "job.nproc", self.nproc, "must be ≥ 1 or auto")
        require(_auto_or(0, self.gpus), "job.gpus", self.gpus, "must be ≥ 0 or auto")
        require(self.max_restarts >= 0, "job.max_restarts", self.max_restarts, "must be ≥ 0")
        require(
            self.max_parallel is None or self.max_parallel >= 1,
            "job.max_parallel",
            self.max_parallel,
            "must be ≥ 1 or null",
        )
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
        # job.yaml is in the run folder, whose readers may not know the secret; the message must not show the value.
        rule = "looks like a secret; export it in the shell, and name it in job.secrets"
        for name, value in self.env.items():
            require(not is_secret_name(name) and not has_secret(str(value)), f"job.env.{name}", "…", rule)
        for key, lines in (("job.setup", self.setup), ("job.flags", self.flags)):
            require(not any(map(has_secret, lines)), key, "…", rule)
        for name in self.secrets:
            is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None
            require(is_name, "job.secrets", "…", "takes names of environment variables, never their values")

        webhook = self.notify.webhook
        named = self.scheduler == "local" or webhook is None or webhook in self.secrets
        require(named, "job.notify.webhook", webhook, "is no variable of the nodes; name it in job.secrets too")

    @property
    def time_s(self) -> int | None:
        """The time limit of one start in seconds."""
        return None if self.time is None else seconds(self.time)

    @property
    def node_range(self) -> tuple[int, int]:
        """Minimum and maximum number of nodes."""
        return node_range(self.nodes)

    def all_causes(self) -> dict[str, CauseConfig]:
        """Return the user's and the built-in causes, in the order of matching."""
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
    """Return the typed job from the composed config; ConfigError in one line for an invalid key or value."""
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

    text: str = yaml.safe_dump(plain_job(job), sort_keys=False, allow_unicode=True)
    return text


def plain_job(job: JobConfig) -> dict[str, Any]:
    """Return the job as dicts, lists and scalars."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(job))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def _one_line(error: BaseException) -> str:
    """Return the first line of OmegaConf's message, prefixed with its key."""
    lines = [line.strip() for line in str(error).splitlines()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return f"job.{key}: {lines[0]}" if key else lines[0]

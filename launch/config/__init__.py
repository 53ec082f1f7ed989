"""Config of a job: scheduler, number of processes, limits. The trainer does not know these keys."""

from everstep.launch.config.devices import processes, refuse_too_many, threads
from everstep.launch.config.failure_patterns import CauseConfig, Remedy
from everstep.launch.config.job import JobConfig, job_config, job_yaml
from everstep.launch.config.kubernetes import KubernetesConfig
from everstep.launch.config.parsing import node_range, seconds

__all__ = [
    "CauseConfig",
    "JobConfig",
    "KubernetesConfig",
    "Remedy",
    "job_config",
    "job_yaml",
    "node_range",
    "processes",
    "refuse_too_many",
    "seconds",
    "threads",
]

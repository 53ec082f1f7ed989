"""What a job is: where, for how long and how often processes are started. The trainer knows none of these keys."""

from launch.config.cause import CauseConfig, Remedy
from launch.config.devices import processes, refuse_too_many, threads
from launch.config.job import JobConfig, job_config, job_yaml
from launch.config.kubernetes import KubernetesConfig
from launch.config.words import node_range, seconds

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

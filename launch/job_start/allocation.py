"""What a scheduler has given: the job, this node and its fellows. One small reader for each scheduler's environment."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from everstep.launch.job_start.hostlist import expand


@dataclass(frozen=True)
class Allocation:
    """The nodes of one start of a job, seen from one of them."""

    scheduler: str
    job: str
    restart: int
    """How often the scheduler has started the job before."""
    host: str
    """This node's name, as the scheduler knows it."""
    hosts: tuple[str, ...]
    rank: int = 0
    """This node's place among the hosts; the first keeps the store at which all meet."""
    address: str | None = None
    """Of this node as its fellows reach it, where the scheduler says it."""

    @staticmethod
    def of(environment: Mapping[str, str]) -> Allocation:
        """What the environment says; one node by itself where no scheduler has written into it."""
        if "SLURM_JOB_ID" in environment:
            return _slurm(environment)
        if "EVERSTEP_JOB" in environment:
            return _kubernetes(environment)
        host = socket.gethostname()
        return Allocation("local", "local", 0, host, (host,))


def _slurm(environment: Mapping[str, str]) -> Allocation:
    # The job's list, and not the step's: a verdict inside of a container is asked for in a step of one node.
    hosts = expand(environment["SLURM_JOB_NODELIST"])
    return Allocation(
        "slurm",
        _slurm_job(environment),
        int(environment.get("SLURM_RESTART_COUNT", "0")),
        environment.get("SLURMD_NODENAME", socket.gethostname()),
        hosts,
        int(environment.get("SLURM_NODEID", "0")),
    )


def _slurm_job(environment: Mapping[str, str]) -> str:
    """As its handle has it. Of an array's elements one has the number of the whole array as its job's."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return environment["SLURM_JOB_ID"] if array is None else f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"


def _kubernetes(environment: Mapping[str, str]) -> Allocation:
    """One pod; who its fellows are, the pods say to each other in the run folder."""
    host = socket.gethostname()
    index = int(environment.get("JOB_COMPLETION_INDEX", "0"))
    return Allocation("k8s", environment["EVERSTEP_JOB"], 0, host, (host,), index, environment.get("POD_IP"))

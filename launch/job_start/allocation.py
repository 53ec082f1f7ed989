"""The nodes that a scheduler has allocated, read from its environment variables and host lists."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass


def expand(text: str) -> tuple[str, ...]:
    """Return the names in order: `n[1-2],m3` is n1, n2, m3; leading zeros stay."""
    return tuple(name for part in _split(text) for name in _expand_one(part))


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [part for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) if part.strip()]


def _expand_one(part: str) -> list[str]:
    form = re.search(r"\[([^\]]*)\]", part)
    if form is None:
        return [part]
    before, after = part[: form.start()], _expand_one(part[form.end() :])
    return [f"{before}{number}{rest}" for span in form[1].split(",") for number in _numbers(span) for rest in after]


def _numbers(span: str) -> list[str]:
    first, dash, last = span.partition("-")
    if not dash:
        return [first]
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


@dataclass(frozen=True)
class Allocation:
    """The nodes of one start of a job, seen from one of them."""

    scheduler: str
    job: str
    restart: int
    """Number of times the scheduler has started the job before."""
    host: str
    """Name of this node, as the scheduler knows it."""
    hosts: tuple[str, ...]
    rank: int = 0
    """Index of this node among the hosts; node 0 hosts the rendezvous store."""
    address: str | None = None
    """Address of this node for the other nodes, if the scheduler gives it."""

    @staticmethod
    def of(environment: Mapping[str, str]) -> Allocation:
        """Read the allocation from the environment; without a scheduler it is this node alone."""
        if "SLURM_JOB_ID" in environment:
            return _slurm(environment)
        if "EVERSTEP_JOB" in environment:
            return _kubernetes(environment)
        host = socket.gethostname()
        return Allocation("local", "local", 0, host, (host,))


def _slurm(environment: Mapping[str, str]) -> Allocation:
    # The nodes of the job, not of the step: a decision inside a container is made in a step of one node.
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
    """Return the job number as in its handle; an element's own SLURM_JOB_ID may be that of the array."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return environment["SLURM_JOB_ID"] if array is None else f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"


def _kubernetes(environment: Mapping[str, str]) -> Allocation:
    """Return the allocation of one pod; the pods find each other through the run folder."""
    host = socket.gethostname()
    index = int(environment.get("JOB_COMPLETION_INDEX", "0"))
    return Allocation("k8s", environment["EVERSTEP_JOB"], 0, host, (host,), index, environment.get("POD_IP"))

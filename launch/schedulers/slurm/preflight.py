"""Checks before a submission to Slurm, for jobs that it would refuse or never start.

The checks are pure functions of the output of Slurm's commands. Slurm itself is not enough: without accounting
`sbatch --test-only` accepts a partition that is down, a time beyond its limit, and any account or QOS; with it, a time
beyond the limit of most QOS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from everstep.errors import nearest
from everstep.launch.config import JobConfig
from everstep.launch.console import duration, say
from everstep.launch.schedulers.slurm.commands import Ask
from everstep.launch.schedulers.slurm.partitions import (
    Lines,
    Nodes,
    Partition,
    choice,
    nodes_of,
    partitions_of,
    settings,
    too_long,
)
from everstep.launch.schedulers.slurm.sbatch import gpus_per_node, request_flags

PARTITIONS = ("scontrol", "show", "partition", "-o")
NODES = ("sinfo", "--json")
NO_SUCH_NODES = "Requested node configuration is not available"
ABOUT = {
    "accounting/qos policy": "job.time, job.nodes or job.qos",
    "account": "job.account",
    "partition": "job.partition",
    "qos": "job.qos",
    "time limit": "job.time",
    "feature": "job.constraint",
    "reservation": "job.reservation",
    "node name": "job.exclude",
    "node configuration": "job.nodes, job.gpus, job.cpus or job.mem",
}
"""Text in Slurm's refusals → the key to change."""
POLICY = re.compile(r"\b(?:QOS|Assoc)[A-Z][A-Za-z]+")
"""Name of the limit of an account or a QOS that Slurm reports."""
LIMITS = {
    "WallDuration": "job.time",
    "Node": "job.nodes",
    "GRES": "job.gpus",
    "Cpu": "job.cpus",
    "Mem": "job.mem",
    "Job": "job.qos",
}
"""Part of such a name → the key to change."""


def problems(job: JobConfig, ask: Ask, note: Callable[[str], None] = say) -> list[str]:
    """Return one line per problem with the key to change; empty if the job could start.

    Args:
        note: receives lines about unusual values that may be intended.
    """
    told = ask(PARTITIONS)
    if told.code != 0:
        return [f"job.scheduler='slurm': {told.last_line}"]
    partitions = partitions_of(told.out)
    wanted, unknown = _wanted(job, partitions)
    if unknown:
        return unknown
    nodes = nodes_of(ask(NODES).out)
    # A job may go to any of several partitions: one that accepts it is enough.
    found = [_against(job, partition, nodes) for partition in wanted]
    if all(found):
        return found[0]
    for line in _crowd(job, [group for group in nodes if any(each.name in group.partitions for each in wanted)]):
        note(line)
    fit = [partition for partition, against in zip(wanted, found, strict=True) if not against]
    return _by_accounting(job, fit, ask, note) or _refusal(job, wanted, nodes, ask)


def _by_accounting(job: JobConfig, fit: Sequence[Partition], ask: Ask, note: Callable[[str], None]) -> list[str]:
    """Return limits from accounting that Slurm does not report; queried only where they can matter."""
    if job.secrets and "job_env" in settings(_lines(ask)).stored:
        note(
            f"job.secrets={job.secrets}: the cluster keeps the environment of every job in its database "
            "(AccountingStoreFlags=job_env), and their values with it"
        )
    if job.time_s is None:
        return []
    return [f"job.time={job.time}: {line}" for line in too_long(job.time_s, job.account, job.qos, fit, _lines(ask))]


def _lines(ask: Ask) -> Lines:
    def lines(argv: Sequence[str]) -> list[str]:
        told = ask(argv)
        return told.out.splitlines() if told.code == 0 else []

    return lines


def _wanted(job: JobConfig, partitions: dict[str, Partition]) -> tuple[list[Partition], list[str]]:
    """Return the job's partitions, and a line per unknown name."""
    there = ", ".join(partitions)
    if job.partition is None:
        default = [partition for partition in partitions.values() if partition.default]
        missing = f"job.partition=null: the cluster has no default partition ({there}); set job.partition"
        return default, ([] if default else [missing])
    names = job.partition.split(",")
    unknown = [
        f"job.partition={name!r}: there is no such partition{nearest(name, partitions)}; there are {there}"
        for name in names
        if name not in partitions
    ]
    return [partitions[name] for name in names if name in partitions], unknown


def _against(job: JobConfig, partition: Partition, nodes: Sequence[Nodes]) -> list[str]:
    inside = [group for group in nodes if partition.name in group.partitions]
    return [*_limits(job, partition), *_hardware(job, partition, inside)]


def _limits(job: JobConfig, partition: Partition) -> list[str]:
    name, fewest, found = partition.name, job.node_range[0], []
    if not partition.up:
        found.append(f"job.partition={name!r}: it is {partition.state}; choose another")
    if job.time_s is not None and partition.max_time_s is not None and job.time_s > partition.max_time_s:
        limit = duration(partition.max_time_s)
        found.append(f"job.time={job.time}: partition {name} allows at most {limit}; change job.time")
    most = min(partition.nodes, partition.max_nodes or partition.nodes)
    if fewest > most:
        has = f"has {partition.nodes}" if most == partition.nodes else f"allows at most {most}"
        found.append(f"job.nodes={fewest}: partition {name} {has} nodes; change job.nodes")
    if fewest < partition.min_nodes:
        found.append(f"job.nodes={fewest}: partition {name} takes jobs of at least {partition.min_nodes} nodes")
    for key, value, allowed in (("account", job.account, partition.accounts), ("qos", job.qos, partition.qos)):
        if value is not None and allowed is not None and value not in allowed:
            there = ", ".join(sorted(allowed))
            found.append(f"job.{key}={value!r}: partition {name} allows only {there}; change job.{key}")
    return found


def _hardware(job: JobConfig, partition: Partition, inside: Sequence[Nodes]) -> list[str]:
    """Return resources that no node has; else a line if too few nodes have all of them."""
    # A node list that is missing, or that lacks nodes which are powered up on demand, proves nothing:
    # `sbatch --test-only` then decides.
    if not inside or sum(group.count for group in inside) < partition.nodes:
        return []
    asks = {
        "job.gpus": (gpus_per_node(job), "gpus", "GPUs"),
        "job.cpus": (job.cpus, "cpus", "CPUs"),
        "job.mem": (megabytes(job.mem), "memory_mb", "MB of memory"),
    }
    found = []
    for key, (wanted, attribute, unit) in asks.items():
        most = max(getattr(group, attribute) for group in inside)
        if attribute == "memory_mb":
            most = min(most, partition.max_memory_mb or most)
        if wanted is not None and wanted > most:
            auto = " (as many as job.nproc)" if key == "job.gpus" and job.gpus == "auto" else ""
            has = f"nodes of partition {partition.name} have at most {most} {unit}"
            said = job.mem if key == "job.mem" else wanted
            found.append(f"{key}={said}{auto}: {has}; change {key}")
    fewest = job.node_range[0]
    enough = [
        group
        for group in inside
        if group.name not in job.exclude
        and all(getattr(group, which) >= (wanted or 0) for wanted, which, _ in asks.values())
    ]
    count = sum(group.count for group in enough)
    if not found and fewest <= partition.nodes and count < fewest:
        excluded = f", without {' '.join(job.exclude)}" if job.exclude else ""
        found.append(
            f"job.nodes={fewest}: only {count} nodes of partition {partition.name} have what is asked of each"
            f"{excluded}; change job.nodes"
        )
    return found


def _crowd(job: JobConfig, nodes: Sequence[Nodes]) -> list[str]:
    """Return a line if there are more processes than CPUs: slow, but a test with few nodes may want it."""
    most = max((group.cpus for group in nodes), default=0)
    if not isinstance(job.nproc, int) or not 0 < most < job.nproc:
        return []
    return [
        f"job.nproc={job.nproc}: the nodes have at most {most} CPUs, so processes wait for each other's; "
        "change job.nproc if that is not meant"
    ]


def megabytes(text: str | None) -> int | None:
    """Return MB of Slurm's 64G, 500M, 1T or a plain number of MB; None if missing or of another form."""
    form = re.fullmatch(r"(\d+)([KMGT]?)B?", (text or "").strip().upper())
    if form is None:
        return None
    return int(int(form[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[form[2]])


def _refusal(job: JobConfig, wanted: Sequence[Partition], nodes: Sequence[Nodes], ask: Ask) -> list[str]:
    """Return the refusal of `sbatch --test-only`, which submits nothing."""
    told = ask(["sbatch", "--test-only", *request_flags(job), "--wrap=true"])
    if told.code == 0:
        return []
    names = {partition.name for partition in wanted}
    out_of_service = any(not group.in_service and names & set(group.partitions) for group in nodes)
    if NO_SUCH_NODES in told.last_line and out_of_service:
        return []  # the nodes exist but are out of service now: the job would wait for them
    said = re.sub(r"^(sbatch: error: |allocation failure: )+", "", told.last_line)
    if policy := POLICY.search(f"{told.out}\n{told.err}"):
        key = next((key for word, key in LIMITS.items() if word in policy[0]), "job.qos")
        return [f"{key}: Slurm refuses the job: {policy[0]}; change {' or '.join(dict.fromkeys((key, 'job.qos')))}"]
    key = next((key for word, key in ABOUT.items() if word in said.lower()), "job")
    there = choice(key, job.account, _lines(ask)) if key in ("job.account", "job.qos") else ""
    return [f"{key}: Slurm refuses the job: {said}{there}"]

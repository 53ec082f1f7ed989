"""Partitions, nodes, accounts and QOS of a Slurm cluster, parsed from what its commands print."""

from __future__ import annotations

import json
import os
import pwd
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.launch.console import duration

AWAY = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "MAINT", "NOT_RESPONDING", "UNKNOWN", "ERROR"}
"""States of nodes that accept no job now. Nodes powered down to save energy are powered up for a job."""


@dataclass(frozen=True)
class Partition:
    """Partition and its limits; None is no limit, for names that all are allowed."""

    name: str
    state: str = "UP"
    default: bool = False
    nodes: int = 0
    min_nodes: int = 0
    max_nodes: int | None = None
    max_time_s: int | None = None
    max_memory_mb: int | None = None
    accounts: frozenset[str] | None = None
    qos: frozenset[str] | None = None
    own_qos: str | None = None
    """QOS of the partition; its limits hold for all jobs in it."""

    @property
    def up(self) -> bool:
        return self.state == "UP"


@dataclass(frozen=True)
class Nodes:
    """Group of equal nodes, and the resources of each."""

    count: int
    partitions: tuple[str, ...]
    cpus: int = 0
    memory_mb: int = 0
    gpus: int = 0
    in_service: bool = True
    name: str = ""
    """Name of a single node."""


def partitions_of(text: str) -> dict[str, Partition]:
    """Parse `scontrol show partition -o`, one line per partition; this form is the same in many versions."""
    found = {}
    for line in text.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if name := words.get("PartitionName"):
            found[name] = Partition(
                name,
                words.get("State", "UP"),
                words.get("Default") == "YES",
                _number(words.get("TotalNodes")) or 0,
                _number(words.get("MinNodes")) or 0,
                _number(words.get("MaxNodes")),
                clock_s(words.get("MaxTime", "UNLIMITED")),
                _number(words.get("MaxMemPerNode")),
                _names(words.get("AllowAccounts")),
                _names(words.get("AllowQos")),
                None if words.get("QoS", "N/A") == "N/A" else words["QoS"],
            )
    return found


def clock_s(text: str) -> int | None:
    """Return the seconds of 1-02:00:00, 02:00:00, 30:00 as Slurm prints them; None for UNLIMITED."""
    form = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if form is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in form.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def nodes_of(text: str) -> list[Nodes]:
    """Parse `sinfo --json`: up to 22.05 an object per node, later one per group of equal nodes."""
    try:
        tree = json.loads(text)
    except ValueError:
        return []
    if isinstance(tree.get("sinfo"), list):
        return [_group(each) for each in tree["sinfo"]]
    return [_node(each) for each in tree.get("nodes") or []]


def _node(node: dict[str, Any]) -> Nodes:
    state = node.get("state", "")
    words = {
        str(word).upper()
        for word in [*(state if isinstance(state, list) else [state]), *(node.get("state_flags") or [])]
    }
    return Nodes(
        1,
        tuple(node.get("partitions") or ()),
        plain(node.get("cpus")),
        plain(node.get("real_memory")),
        gpus_of(node.get("gres") or ""),
        not words & AWAY,
        str(node.get("name", "")),
    )


def _group(group: dict[str, Any]) -> Nodes:
    partition = group.get("partition")
    name = partition.get("name") if isinstance(partition, dict) else partition
    names = group["nodes"].get("nodes") or []
    words = {str(word).upper() for word in group.get("node", {}).get("state") or []}
    return Nodes(
        plain(group["nodes"].get("total")),
        (str(name),),
        plain(group.get("cpus", {}).get("maximum")),
        plain(group.get("memory", {}).get("maximum")),
        gpus_of(group.get("gres", {}).get("total") or ""),
        not words & AWAY,
        str(names[0]) if len(names) == 1 else "",
    )


def plain(number: Any) -> int:
    """Return a number of any version: plain, or {"set": true, "infinite": false, "number": 4}."""
    if isinstance(number, dict):
        return int(number["number"]) if number.get("set", True) and not number.get("infinite") else 0
    return int(number or 0)


def gpus_of(gres: str) -> int:
    """Return the number of GPUs in "gpu:a100:8(S:0-1),nvme:1"."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _names(text: str | None) -> frozenset[str] | None:
    return None if text in (None, "ALL", "N/A", "(null)") else frozenset(str(text).split(","))


CONFIG = ("scontrol", "show", "config")
ADMIN = ("sacctmgr", "--noheader", "--parsable2", "show")
Lines = Callable[[Sequence[str]], list[str]]
"""Return the output lines of a Slurm command; empty if it fails."""


@dataclass(frozen=True)
class Association:
    """Association of a user with one account."""

    account: str
    qos: tuple[str, ...]
    default_qos: str
    is_default: bool


@dataclass(frozen=True)
class Settings:
    """Accounting settings of the cluster's configuration."""

    cluster: str
    enforced: frozenset[str]
    stored: frozenset[str]
    """Optional data of a job that the database stores (AccountingStoreFlags)."""

    @property
    def limits(self) -> bool:
        return bool(self.enforced & {"limits", "safe", "all"})


def settings(lines: Lines) -> Settings:
    pairs = [line.split("=", 1) for line in lines(CONFIG) if "=" in line]
    told = {key.strip(): value.strip() for key, value in pairs}
    words = [frozenset(told.get(key, "").split(",")) for key in ("AccountingStorageEnforce", "AccountingStoreFlags")]
    return Settings(told.get("ClusterName", ""), *words)


def associations(cluster: str, lines: Lines) -> list[Association]:
    """Return the associations of the current user; empty if sacctmgr does not show them."""
    user = pwd.getpwuid(os.getuid()).pw_name
    question = (*ADMIN, "user", user, "withassoc", f"cluster={cluster}", "format=DefaultAccount,Account,QOS,DefaultQOS")
    rows = [line.split("|") for line in lines(question)]
    return [
        Association(account, tuple(filter(None, qos.split(","))), default, account == default_account)
        for default_account, account, qos, default in (row for row in rows if len(row) == 4)
    ]


def too_long(
    time_s: int, account: str | None, qos: str | None, partitions: Sequence[Partition], lines: Lines
) -> Iterator[str]:
    """Yield a line if the QOS does not allow so long a job; the caller adds the key and its value."""
    known = settings(lines)
    # A QOS of the partition may have a limit that takes precedence.
    if not known.limits or any(partition.own_qos for partition in partitions):
        return
    name = qos or _default_qos(account, associations(known.cluster, lines))
    rows = [line.split("|") for line in lines((*ADMIN, "qos", "format=Name,MaxWall"))]
    longest = {row[0]: clock_s(row[1]) for row in rows if len(row) == 2}.get(name)
    if longest is not None and time_s > longest:
        yield f"QOS {name} allows at most {duration(longest)}; change job.time or job.qos"


def _default_qos(account: str | None, known: Sequence[Association]) -> str:
    ours = [each for each in known if each.account == account or (account is None and each.is_default)]
    return ours[0].default_qos if ours else ""


def choice(key: str, account: str | None, lines: Lines) -> str:
    """Return the list of accounts, or of an account's QOS, for an error message; empty if unknown."""
    known = associations(settings(lines).cluster, lines)
    if key == "job.account":
        names = [each.account for each in known]
    else:
        names = [
            name
            for each in known
            if each.account == account or (account is None and each.is_default)
            for name in each.qos
        ]
    return f"; you may use {', '.join(dict.fromkeys(names))}" if names else ""

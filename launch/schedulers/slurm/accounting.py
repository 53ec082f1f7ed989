"""Accounts and QOS of a user with their limits, as printed by `scontrol` and `sacctmgr`.

Slurm itself checks whether an account or a QOS may be used: if associations are not enforced, any name works. It does
not report which ones exist, nor that a job is longer than its QOS allows, unless the QOS has DenyOnLimit: such a job is
accepted and waits without end.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from everstep.launch.schedulers.slurm.partitions import Partition, clock_s
from everstep.launch.text_tables import duration

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
        names = [name for each in known if each.account == account or (account is None and each.is_default)
                 for name in each.qos]  # fmt: skip
    return f"; you may use {', '.join(dict.fromkeys(names))}" if names else ""

"""What Slurm's accounting lets a user have, as `scontrol` and `sacctmgr` print it: accounts, QOS and their limits.

Whether an account or a QOS may be used Slurm says itself, and is believed: where associations are not enforced any name
will do. What it does not say is which ones there are; nor that a job is longer than its QOS allows, unless the QOS has
DenyOnLimit: such a job is accepted, and waits for ever.
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
"""What a command of Slurm's prints; nothing when it fails."""


@dataclass(frozen=True)
class Association:
    """What a user may have by one account."""

    account: str
    qos: tuple[str, ...]
    default_qos: str
    is_default: bool


@dataclass(frozen=True)
class Settings:
    """What the cluster's configuration says of accounting."""

    cluster: str
    enforced: frozenset[str]
    stored: frozenset[str]
    """What of a job goes into the database beside its facts."""

    @property
    def limits(self) -> bool:
        return bool(self.enforced & {"limits", "safe", "all"})


def settings(lines: Lines) -> Settings:
    pairs = [line.split("=", 1) for line in lines(CONFIG) if "=" in line]
    told = {key.strip(): value.strip() for key, value in pairs}
    words = [frozenset(told.get(key, "").split(",")) for key in ("AccountingStorageEnforce", "AccountingStoreFlags")]
    return Settings(told.get("ClusterName", ""), *words)


def associations(cluster: str, lines: Lines) -> list[Association]:
    """Those of the user who asks; none where sacctmgr does not show them."""
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
    """That no job of the QOS may take so long; the value itself is for the caller to name."""
    known = settings(lines)
    # A QOS of the partition may have a limit that goes before.
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
    """The accounts, or the QOS of an account, that the user may name; empty where nobody tells."""
    known = associations(settings(lines).cluster, lines)
    if key == "job.account":
        names = [each.account for each in known]
    else:
        names = [name for each in known if each.account == account or (account is None and each.is_default)
                 for name in each.qos]  # fmt: skip
    return f"; you may use {', '.join(dict.fromkeys(names))}" if names else ""

"""What accounting has against a job, by lines as Slurm 22.05 with a slurmdbd prints them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from test_slurm_preflight import RECORDED, Job

from everstep.launch.schedulers.slurm.commands import Answer
from everstep.launch.schedulers.slurm.preflight import problems

CONFIG = """Configuration data as of 2026-11-25T17:06:57
AccountingStorageEnforce = {enforced}
AccountingStoreFlags    = {stored}
ClusterName             = everstep0
"""
USER = "root|lab|normal,short,strict|short\nroot|root|normal|\n"
QOS = "normal|\nshort|00:30:00\nstrict|1-00:00:00\n"


class Accounted:
    """Slurm's commands, with accounting."""

    def __init__(self, enforced: str = "associations,limits,qos", stored: str = "job_comment") -> None:
        self.config = CONFIG.format(enforced=enforced, stored=stored)
        self.partitions = (RECORDED / "partitions.txt").read_text()
        self.user = USER
        self.refusal = ""

    def __call__(self, argv: Sequence[str]) -> Answer:
        if argv[0] == "sbatch":
            return Answer(1 if self.refusal else 0, err=self.refusal)
        if argv[0] == "sinfo":
            return Answer(0, (RECORDED / "sinfo.json").read_text())
        if argv[0] == "sacctmgr":
            return Answer(0, self.user if "user" in argv else QOS)
        return Answer(0, self.config if argv[-1] == "config" else self.partitions)


@pytest.mark.parametrize(("job", "said"), [
    (Job(qos="short", time="31m"), ["job.time=31m: QOS short allows at most 30 min; change job.time or job.qos"]),
    (Job(qos="short", time="30m"), []),
    (Job(qos="strict", time="2d"), ["job.time=2d: QOS strict allows at most 1 d; change job.time or job.qos"]),
    (Job(account="lab", time="31m"), ["job.time=31m: QOS short allows at most 30 min; change job.time or job.qos"]),
    (Job(account="root", time="31m"), []),
    (Job(qos="normal", time="9d"), []),
    (Job(qos="short"), []),
])  # fmt: skip
def test_a_time_is_held_against_the_qos_that_the_job_would_have(job: Job, said: list[str]) -> None:
    assert problems(job, Accounted()) == said


def test_where_limits_are_not_enforced_there_are_none() -> None:
    assert problems(Job(qos="short", time="31m"), Accounted("associations,qos")) == []


def test_the_qos_of_a_partition_may_have_another_limit_so_slurm_has_the_last_word() -> None:
    cluster = Accounted()
    cluster.partitions = cluster.partitions.replace("QoS=N/A", "QoS=wide")
    assert problems(Job(qos="short", time="31m"), cluster) == []


@pytest.mark.parametrize(("refusal", "said"), [
    ("sbatch: error: QOSMaxWallDurationPerJobLimit\n", "job.time: Slurm refuses the job: "
                                                       "QOSMaxWallDurationPerJobLimit; change job.time or job.qos"),
    ("sbatch: error: AssocMaxNodePerJobLimit\n", "job.nodes: Slurm refuses the job: AssocMaxNodePerJobLimit; change "
                                                 "job.nodes or job.qos"),
    ("sbatch: error: QOSMaxSubmitJobPerUserLimit\n", "job.qos: Slurm refuses the job: QOSMaxSubmitJobPerUserLimit; "
                                                     "change job.qos"),
    ("", "job.time, job.nodes or job.qos: Slurm refuses the job: Job violates accounting/QOS policy"),
])  # fmt: skip
def test_a_limit_that_slurm_names_is_told_with_the_key_to_change(refusal: str, said: str) -> None:
    cluster = Accounted()
    cluster.refusal = f"{refusal}allocation failure: Job violates accounting/QOS policy"
    assert problems(Job(), cluster) == [said]


def test_accounts_and_qos_that_may_be_named_stand_beside_one_that_may_not() -> None:
    cluster = Accounted()
    cluster.refusal = "allocation failure: Invalid account or account/partition combination specified"
    assert problems(Job(account="mine"), cluster)[0].endswith("combination specified; you may use lab, root")
    cluster.refusal = "allocation failure: Invalid qos specification"
    assert problems(Job(account="root", qos="x"), cluster)[0].endswith("specification; you may use normal")
    cluster.user = ""  # sacctmgr shows it to nobody
    assert problems(Job(qos="x"), cluster) == ["job.qos: Slurm refuses the job: Invalid qos specification"]


def test_a_database_that_keeps_the_environment_of_jobs_is_told_of_where_a_job_has_secrets() -> None:
    told: list[str] = []
    keeps = Accounted(stored="job_comment,job_env")
    assert problems(Job(secrets=["WANDB_API_KEY"]), keeps, note=told.append) == []
    assert told == ["job.secrets=['WANDB_API_KEY']: the cluster keeps the environment of every job in its database "
                    "(AccountingStoreFlags=job_env), and their values with it"]  # fmt: skip
    assert problems(Job(), keeps, note=told.append) == []
    assert problems(Job(secrets=["WANDB_API_KEY"]), Accounted(), note=told.append) == []
    assert len(told) == 1

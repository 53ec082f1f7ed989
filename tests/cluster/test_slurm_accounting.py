"""A Slurm with accounting: who may use what and for how long, jobs that the controller has forgotten, secrets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.launch.schedulers.job import JobHandle, JobState
from everstep.launch.schedulers.slurm.scheduler import Slurm
from support.processes import until
from support.slurm import accounting
from support.slurm.accounting import manage
from support.slurm.cluster import PATH, Cluster, missing
from support.slurm.jobs import PATIENCE_S, Job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
SECRET = "plänted-91c4-value"
ENDS = {"done": JobState.succeeded, "failed": JobState.failed, "cancelled": JobState.cancelled}


@pytest.fixture(scope="module")
def accounted() -> Iterator[Cluster]:
    """The user may compute for `lab` with three QOS of four, and one account is not theirs."""
    if reason := missing() or accounting.missing(PATH):
        pytest.skip(reason)
    cluster = Cluster.up(2, accounted=True)
    try:
        for account in ("lab", "others"):
            manage(cluster, "add", "account", account)
        manage(cluster, "add", "qos", "short", "MaxWall=00:30:00")
        manage(cluster, "add", "qos", "strict", "MaxWall=00:10:00", "MaxTRESPerJob=node=1", "Flags=DenyOnLimit")
        manage(cluster, "add", "qos", "closed")
        manage(cluster, "add", "user", "root", "account=lab", "qos=normal,short,strict", "defaultqos=short")
        manage(cluster, "modify", "user", "root", "set", "defaultaccount=lab")
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def refused(accounted: Cluster, tmp_path: Path) -> Job:
    return Job(accounted, tmp_path, "refused")


@pytest.mark.parametrize(("words", "said"), [
    (["job.account=nosuch"], "job.account: Slurm refuses the job: Invalid account or account/partition combination "
                             "specified; you may use lab, root"),
    (["job.account=others"], "job.account: Slurm refuses the job: Invalid account or account/partition combination "
                             "specified; you may use lab, root"),
    (["job.qos=nosuch"], "job.qos: Slurm refuses the job: Invalid qos specification; you may use normal, short, "
                         "strict"),
    (["job.qos=closed"], "job.qos: Slurm refuses the job: Invalid qos specification; you may use normal, short, "
                         "strict"),
    (["job.account=root", "job.qos=short", "job.time=20m"], "job.qos: Slurm refuses the job: Invalid qos "
                                                            "specification; you may use normal"),
    (["job.qos=short"], "job.time=1h: QOS short allows at most 30 min; change job.time or job.qos"),
    ([], "job.time=1h: QOS short allows at most 30 min; change job.time or job.qos"),
    (["job.qos=strict", "job.time=5m", "job.nodes=2"], "job.nodes: Slurm refuses the job: QOSMaxNodePerJobLimit; "
                                                       "change job.nodes or job.qos"),
])  # fmt: skip
def test_what_the_user_may_not_have_is_refused_before_it_is_queued(refused: Job, words: list[str], said: str) -> None:
    with pytest.raises(RuntimeError) as error:
        refused.submit(*words)
    assert str(error.value) == f"exit code 2: everstep: {said}\n"
    assert refused.cluster.run("squeue", "--noheader", "--name=refused") == ""
    assert not Path(refused.folder.url).exists()


def submitted(cluster: Cluster, root: Path, name: str, program: str, *words: str) -> Job:
    job = Job(cluster, root, name)
    (root / f"{name}.py").write_text(program)
    keys = ["job=slurm", "job.nproc=1", "job.gpus=0", "job.qos=short", "job.time=20m", "job.max_restarts=0",
            "job.secrets=[PLANTED_SECRET]", f"run={name}", f"run_root={root}", *words]  # fmt: skip
    job.everstep("submit", *keys, "--", f"{root}/{name}.py", env={"PLANTED_SECRET": SECRET})
    return job


@pytest.fixture(scope="module")
def forgotten(accounted: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that ended in three ways, and that the controller knows no more."""
    root = tmp_path_factory.mktemp("forgotten")
    told = "import os; print(len(os.environ['PLANTED_SECRET']), 'letters')"
    jobs = {
        "done": submitted(accounted, root, "done", told),
        "failed": submitted(accounted, root, "failed", "raise SystemExit(7)"),
        "cancelled": submitted(accounted, root, "cancelled", told, "job.flags=[--hold]"),
    }
    jobs["cancelled"].everstep("cancel", "cancelled", "--root", str(root))
    ids = ",".join(job.id for job in jobs.values())
    # The controller forgets them within seconds, and tells the database when it has time for that.
    ends = ("sacct", "--allocations", "--noheader", f"--jobs={ids}", "--format=End")
    until(lambda: len(told := accounted.output(*ends).split()) == 3 and "Unknown" not in told, PATIENCE_S)
    until(lambda: accounted.output("squeue", "--noheader", "--states=all", f"--jobs={ids}") == "", PATIENCE_S)
    return jobs


@pytest.fixture
def here(accounted: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """This very process talks to the cluster."""
    for name, value in accounted.env.items():
        monkeypatch.setenv(name, value)
    return accounted


def test_the_end_of_a_job_that_squeue_knows_no_more_is_found_in_accounting(
    forgotten: dict[str, Job], here: Cluster
) -> None:
    handles = {name: JobHandle("slurm", f"everstep{here.id}", job.id) for name, job in forgotten.items()}
    found = Slurm().status(list(handles.values()))
    assert {name: found[handle].state for name, handle in handles.items()} == ENDS
    done, failed, cancelled = (found[handles[name]] for name in ENDS)
    assert (done.exit_code, failed.exit_code, failed.reason) == (0, 1, "FAILED")
    assert (done.nodes, cancelled.nodes) in ((("n1",), ()), (("n2",), ()))
    assert done.submitted_at is not None
    assert done.started_at is not None
    assert done.ended_at is not None
    assert time.time() - 600 < done.submitted_at <= done.started_at <= done.ended_at <= time.time()
    assert cancelled.started_at is None


def test_a_forgotten_job_is_found_by_its_token(forgotten: dict[str, Job], here: Cluster) -> None:
    for job in (forgotten["done"], forgotten["failed"]):
        token = json.loads((Path(job.folder.url) / "submissions/0001.json").read_text())["token"]
        assert Slurm().find(token) == JobHandle("slurm", f"everstep{here.id}", job.id)
    assert Slurm().find("everstep-of-nobody") is None


def test_status_and_ls_tell_how_a_forgotten_job_ended(forgotten: dict[str, Job]) -> None:
    job = forgotten["failed"]
    listed = json.loads(job.everstep("ls", "--json", str(job.root)))
    assert {facts["run"]: facts["state"] for facts in listed} == {name: name for name in ENDS}
    assert json.loads(job.everstep("status", "failed", "--root", str(job.root), "--json"))["state"] == "failed"


def test_a_secret_is_in_no_record_and_in_no_file_of_the_database(forgotten: dict[str, Job], accounted: Cluster) -> None:
    job = forgotten["done"]
    assert f"{len(SECRET)} letters" in job.printed()
    facts = accounted.run("sacct", "--parsable2", "--format=ALL", f"--jobs={job.id}")
    script = accounted.run("sacct", "--batch-script", f"--jobs={job.id}")
    assert "everstep.launch.restart.decide" in script  # accounting does keep it
    assert SECRET not in facts + script
    files = [file.read_bytes() for file in (accounted.state / "database").rglob("*") if file.is_file()]
    assert any(b"everstep.launch.restart.decide" in file for file in files)
    assert not any(SECRET.encode() in file for file in files)

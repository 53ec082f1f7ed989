"""submit, status and cancel on the simulated cluster; the pods are a shell that waits."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path

import pytest

from everstep.errors import ConfigError
from everstep.launch.schedulers.job import JobState
from everstep.launch.schedulers.kubernetes.client import Client
from everstep.launch.schedulers.kubernetes.job_status import JOB_UID
from everstep.launch.schedulers.kubernetes.scheduler import Kubernetes
from support.kube.cluster import Cluster
from support.kube.shell_pods import config, rendered, submitted
from support.processes import until

pytestmark = pytest.mark.cluster


def test_a_job_is_made_found_looked_at_and_removed_with_all_that_it_made(cluster: Cluster, tmp_path: Path) -> None:
    scheduler, handle = submitted(cluster, config(tmp_path))
    assert re.fullmatch(r"k8s://current/default/job/demo-[0-9a-f]{8}", str(handle))
    assert scheduler.find("token-1") == handle
    assert scheduler.find("token-2") is None
    status = scheduler.status([handle])[handle]
    assert (status.state, len(status.nodes)) == (JobState.running, 2)
    scheduler.cancel([handle, handle])
    until(
        lambda: (
            not any(
                cluster.store.list(kind)
                for kind in ("jobs", "pods", "services", "networkpolicies", "configmaps", "secrets")
            )
        )
    )
    assert scheduler.status([handle])[handle].state is JobState.unknown


def test_the_same_submission_again_makes_no_second_job(cluster: Cluster, tmp_path: Path) -> None:
    job = config(tmp_path)
    scheduler, handle = submitted(cluster, job)
    assert scheduler.submit(rendered(job)) == handle
    assert len(cluster.store.list("jobs")) == 1


def test_many_jobs_are_looked_at_by_two_questions(cluster: Cluster, tmp_path: Path) -> None:
    job = config(tmp_path, nodes=1)
    scheduler = Kubernetes(job)
    handles = [scheduler.submit(rendered(job, f"token-{number}")) for number in range(5)]
    del cluster.server.requests[:]
    assert len(scheduler.status(handles)) == 5
    assert [request.split()[0] for request in cluster.server.requests] == ["GET", "GET"]


def test_an_api_server_that_is_away_for_a_while_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    job, made = config(tmp_path), []
    scheduler = Kubernetes(job, retry_s=30)
    scheduler.find("warm")
    with cluster.away():
        thread = threading.Thread(target=lambda: made.append(scheduler.submit(rendered(job))))
        thread.start()
        thread.join(1.0)
        assert made == []
    thread.join(30)
    assert scheduler.find("token-1") == made[0]


def test_one_that_stays_away_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.away(), pytest.raises(ConfigError, match=r"the API server http://\S+ has not answered for"):
        Kubernetes(config(tmp_path), retry_s=0.6).find("token-1")


def test_a_server_that_has_too_much_to_do_is_asked_again(cluster: Cluster, tmp_path: Path) -> None:
    cluster.server.busy = 2
    assert Kubernetes(config(tmp_path), retry_s=20).find("token-1") is None
    assert cluster.server.busy == 0


def test_a_context_that_is_not_there_is_one_line(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"job\.k8s\.context='elsewhere': the kubeconfig has simulated"):
        Client("elsewhere", None)


def test_a_job_in_a_queue_says_which_its_place_and_what_it_waits_for(cluster: Cluster, tmp_path: Path) -> None:
    job = config(tmp_path, queue="research")
    scheduler = Kubernetes(job)
    handle = scheduler.submit(rendered(job))
    until(lambda: "suspend" in cluster.store.list("jobs")[0]["spec"])
    status = scheduler.status([handle])[handle]
    assert (status.state, status.reason) == (JobState.pending, "waits in queue research")
    for uid in ("another", cluster.store.list("jobs")[0]["metadata"]["uid"]):
        short = (
            "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor any, 2 more needed"
        )
        cluster.store.create(("workloads", "default", f"job-{uid}"), {
            "kind": "Workload", "spec": {"queueName": "research"},
            "metadata": {"name": f"job-{uid}", "labels": {JOB_UID: uid}, "ownerReferences": [{"uid": uid}]},
            "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": short}]}})  # fmt: skip
    assert scheduler.status([handle])[handle].reason == f"waits in queue research, place 2 of 2: {short}"


def test_a_queue_that_we_may_not_look_into_is_named_all_the_same(cluster: Cluster, tmp_path: Path) -> None:
    job = config(tmp_path, queue="research")
    scheduler = Kubernetes(job)
    handle = scheduler.submit(rendered(job))
    cluster.server.rights.denied |= {("kueue.x-k8s.io", "workloads", "list")}
    assert scheduler.status([handle])[handle].reason == "waits in queue research"


def test_a_pod_on_a_lost_node_is_said_with_what_helps(cluster: Cluster, tmp_path: Path) -> None:
    scheduler, handle = submitted(cluster, config(tmp_path))
    cluster.nodes[cluster.pods()[0]["spec"]["nodeName"]].die()
    until(lambda: "hangs in Terminating" in scheduler.status([handle])[handle].reason)
    assert "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in scheduler.status([handle])[handle].reason


def test_restarts_that_kubernetes_puts_off_for_long_are_said(cluster: Cluster, tmp_path: Path) -> None:
    job = config(tmp_path, nodes=1)
    job = dataclasses.replace(job, k8s=dataclasses.replace(job.k8s, restart_delay_s=15))
    scheduler, handle = submitted(cluster, job)
    cluster.evict(cluster.pods()[0])
    until(lambda: "started again only after 20 s" in scheduler.status([handle])[handle].reason)
    assert scheduler.status([handle])[handle].restarts == 1


def test_who_may_not_see_events_is_told_less_of_a_quota_and_nothing_fails(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everstep.launch.schedulers.kubernetes.job_status.SETTLED_S", 0)
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": {"hard": {"pods": "0"}}}
    cluster.server.create(("resourcequotas", "default", "team"), quota)
    job = config(tmp_path)
    scheduler = Kubernetes(job, retry_s=20)
    handle = scheduler.submit(rendered(job))
    until(lambda: scheduler.status([handle])[handle].reason.startswith("waits for quota team"))
    cluster.server.rights.denied.add(("", "events", "list"))
    status = scheduler.status([handle])[handle]
    assert (status.state, status.reason) == (JobState.pending, "no pod runs yet")

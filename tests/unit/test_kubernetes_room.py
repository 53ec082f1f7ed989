"""Whether a cluster has room for a job is one line for each thing that it lacks, with the key to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep.launch.config import job_config
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.kubernetes import rbac
from everstep.launch.schedulers.kubernetes.capacity import PodRequest, against_nodes, against_quotas
from everstep.launch.schedulers.kubernetes.manifest import objects

PROGRAM = Program("demo", "s3://runs/demo", ("-m", "everstep.trainer"), "everstep-1")
KEYS: dict[str, Any] = {"scheduler": "k8s", "nodes": 3, "nproc": 8, "image": "i", "mem": "64G", "cpus": 16}
RBAC = Path(__file__).parent.parent.parent / "k8s/rbac.yaml"


def asked(**keys: Any) -> PodRequest:
    job = job_config({**KEYS, **keys})
    return PodRequest(job, objects(job, PROGRAM)[-1])


def node(name: str, taints: list[dict[str, str]] | None = None, gpu: str = "8", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}},
            "spec": {"taints": taints} if taints else {},
            "status": {"allocatable": {"cpu": "63500m", "memory": "263851852Ki", "pods": "110",
                                       "nvidia.com/gpu": gpu}}}  # fmt: skip


NODES = [node("n0"), node("n1"), node("n2")]
CLOSED = [{"key": "spot", "value": "yes", "effect": "NoSchedule"}]


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_nodes_that_have_all_of_it_are_no_problem(kind: str) -> None:
    assert list(against_nodes(asked(kind=kind), NODES)) == []


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_gpus_that_no_node_has_are_one_line_naming_the_key(kind: str) -> None:
    nodes = [node("n0", gpu="4"), node("n1", gpu="2")]
    assert list(against_nodes(asked(kind=kind), nodes)) == [
        "job.gpus: a pod asks for 8 of nvidia.com/gpu, and nodes have at most 4; change job.gpus"]  # fmt: skip


@pytest.mark.parametrize(("keys", "nodes", "said"), [
    ({"mem": "300G"}, NODES, "job.mem: a pod asks for 300Gi of memory, and nodes have at most 251.6Gi; change job.mem"),
    ({"cpus": 64}, NODES, "job.cpus: a pod asks for 64 of cpu, and nodes have at most 63.5; change job.cpus"),
    ({"nodes": 4}, NODES, "job.nodes=4: the nodes have places for 3 such pods; change job.nodes"),
    ({"k8s": {"rdma_resource": "rdma/hca"}}, NODES, "change job.k8s.rdma_count"),
    ({"k8s": {"node_selector": {"gpu": "h100"}}}, NODES, "none of 3 nodes has the labels {'gpu': 'h100'}"),
    ({"exclude": ["n1"]}, NODES, "places for 2 such pods"),
    ({}, [*NODES[:2], node("n2", CLOSED)], "places for 2 such pods, others are closed by spot (job.k8s.tolerations)"),
])  # fmt: skip
def test_what_nodes_lack_is_said(keys: dict[str, Any], nodes: list[dict[str, Any]], said: str) -> None:
    (line,) = against_nodes(asked(**keys), nodes)
    assert said in line


@pytest.mark.parametrize(("keys", "nodes"), [
    ({"nodes": "2:4"}, NODES[:2]),
    ({"gpus": 2, "nproc": 2}, NODES[:1]),
    ({"k8s": {"node_selector": {"kind": "h100"}}}, [node(name, kind="h100") for name in "abc"]),
    ({"k8s": {"tolerations": [{"key": "spot", "operator": "Exists"}]}}, [node(name, CLOSED) for name in "abc"]),
    ({"k8s": {"tolerations": [{"key": "spot", "value": "yes"}]}}, [node(name, CLOSED) for name in "abc"]),
    ({}, [node(name, [{"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}]) for name in "abc"]),
])  # fmt: skip
def test_what_will_do_is_no_problem(keys: dict[str, Any], nodes: list[dict[str, Any]]) -> None:
    assert list(against_nodes(asked(**keys), nodes)) == []


def quota(hard: dict[str, str], used: dict[str, str] | None = None, **spec: Any) -> list[dict[str, Any]]:
    return [{"metadata": {"name": "q"}, "spec": spec, "status": {"hard": hard, "used": used or {}}}]


@pytest.mark.parametrize(("keys", "hard", "used", "said"), [
    ({}, {"requests.nvidia.com/gpu": "32"}, {"requests.nvidia.com/gpu": "16"},
     "quota q: of requests.nvidia.com/gpu 32 16 are used, and 3 pods ask for 24; change job.gpus"),
    ({}, {"requests.memory": "100Gi"}, {}, "and 3 pods ask for 192Gi; change job.mem"),
    ({}, {"limits.memory": "100Gi"}, {}, "change job.mem"),
    ({}, {"pods": "4"}, {"pods": "2"}, "of pods 4 2 are used, and the job makes 3; change job.nodes"),
    ({}, {"count/jobs.batch": "1"}, {"count/jobs.batch": "1"}, "the job makes 1; change job.k8s.namespace"),
    ({"cpus": None}, {"cpu": "100"}, {}, "every pod must say its cpu, unless a LimitRange does for it; set job.cpus"),
    ({}, {"limits.cpu": "100"}, {}, "every pod must say its limits.cpu"),
])  # fmt: skip
def test_what_a_quota_leaves_too_little_of_is_said(
    keys: dict[str, Any], hard: dict[str, str], used: dict[str, str], said: str
) -> None:
    (line,) = against_quotas(asked(**keys), quota(hard, used))
    assert said in line


def test_a_quota_that_leaves_enough_or_is_for_other_pods_is_no_problem() -> None:
    enough = {"requests.cpu": "48", "requests.memory": "192Gi", "pods": "3", "persistentvolumeclaims": "0"}
    assert list(against_quotas(asked(), quota(enough))) == []
    assert list(against_quotas(asked(nodes="2:4"), quota({"pods": "2"}))) == []
    assert list(against_quotas(asked(), quota({"pods": "0"}, scopes=["BestEffort"]))) == []


def test_the_role_in_the_repository_grants_what_the_launcher_needs() -> None:
    if not RBAC.exists():
        pytest.skip("this test reads a checkout")
    role = next(each for each in yaml.safe_load_all(RBAC.read_text()) if each["kind"] == "Role")
    assert [right for right in rbac.needed() if not rbac.covers(role["rules"], right)] == []
    written = {(group, resource): tuple(rule["verbs"]) for rule in role["rules"] for group in rule["apiGroups"]
               for resource in rule["resources"]}  # fmt: skip
    assert {key: verbs for key, verbs in written.items() if key in rbac.GRANTED} == rbac.GRANTED
    for_the_doctor = {("", "resourcequotas"), ("", "persistentvolumeclaims"), ("kueue.x-k8s.io", "localqueues")}
    for_queues = {("kueue.x-k8s.io", "workloads"), ("visibility.kueue.x-k8s.io", "localqueues/pendingworkloads")}
    for_status = {*for_queues, ("", "events")}
    assert written.keys() - rbac.GRANTED.keys() == for_the_doctor | for_status


def test_a_rule_for_single_names_grants_nothing_to_all() -> None:
    rule = {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}
    assert rbac.covers([rule], ("batch", "jobs", "create"))
    assert not rbac.covers([{**rule, "resourceNames": ["mine"]}], ("batch", "jobs", "create"))
    assert list(rbac.missing([("batch", "jobs", "create"), ("batch", "jobs", "delete"), ("", "pods", "list")])) == [
        "create, delete jobs.batch", "list pods"]  # fmt: skip

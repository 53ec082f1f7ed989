"""The simulated control plane does what a real Kubernetes 1.36 was seen to do: one test a case, times scaled."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.kube.admission import admit
from support.kube.cluster import Cluster
from support.kube.node_process import marked
from support.processes import until

SCALE = 0.02
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
COUNTED = "batch.kubernetes.io/job-index-failure-count"
WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"
IGNORE_DISRUPTION = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
FAIL_78 = {"action": "FailJob", "onExitCodes": {"containerName": "c", "operator": "In", "values": [78]}}
IGNORE_CODES = {"action": "Ignore", "onExitCodes": {"containerName": "c", "operator": "In", "values": [75, 143]}}
OURS = [IGNORE_DISRUPTION, FAIL_78, IGNORE_CODES]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster.up(tmp_path, 3, SCALE) as made:
        yield made
    assert made.errors == []


def script(*of: str) -> str:
    """Each index does its own line."""
    return "case $I in " + " ".join(f"{index}) {line} ;;" for index, line in enumerate(of)) + " esac"


def job(shell: str, pods: int = 2, rules: list[dict[str, Any]] | None = None, **spec: Any) -> dict[str, Any]:
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    container = {"name": "c", "image": "i", "command": ["sh", "-c", shell],
                 "env": [{"name": "I", "valueFrom": {"fieldRef": index}}]}  # fmt: skip
    tolerations = [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
                    "tolerationSeconds": 3}]  # fmt: skip
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"},
        "spec": {
            "completionMode": "Indexed", "completions": pods, "parallelism": pods, "backoffLimitPerIndex": 2,
            "podFailurePolicy": {"rules": OURS if rules is None else rules}, "podReplacementPolicy": "Failed", **spec,
            "template": {"spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 2,
                                  "containers": [container], "tolerations": tolerations}},
        },
    }  # fmt: skip


def submit(cluster: Cluster, made: dict[str, Any]) -> None:
    made["spec"]["template"].setdefault("metadata", {})
    cluster.server.create(("jobs", "default", "j"), made)


def condition(cluster: Cluster, kind: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = cluster.job("j")["status"].get("conditions", [])
    return next((each for each in found if each["type"] == kind), None)


def running(cluster: Cluster, count: int = 2) -> list[dict[str, Any]]:
    """The pods that run, by index, once there are so many, and each has had a moment to set its trap."""
    until(lambda: len([p for p in cluster.pods("j", "Running") if "deletionTimestamp" not in p["metadata"]]) == count)
    pods = [pod for pod in cluster.pods("j", "Running") if "deletionTimestamp" not in pod["metadata"]]
    for pod in pods:
        until(lambda pod=pod: _has_child(cluster.process(pod).container.pid))
    return sorted(pods, key=lambda pod: pod["spec"]["hostname"])


def _has_child(pid: int) -> bool:
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().strip())


def notes(pod: dict[str, Any]) -> tuple[int, int]:
    """Failures that count, and those that were ignored."""
    return tuple(int(pod["metadata"]["annotations"].get(key, 0)) for key in (COUNTED, IGNORED))  # type: ignore[return-value]


def replaced(cluster: Cluster, index: int, old: dict[str, Any]) -> dict[str, Any]:
    def new() -> list[dict[str, Any]]:
        return [pod for pod in cluster.pods("j", "Running") if pod["spec"]["hostname"] == f"j-{index}"
                and pod["metadata"]["uid"] != old["metadata"]["uid"]]  # fmt: skip

    until(lambda: bool(new()))
    return new()[0]


def test_exit_code_78_fails_the_job_with_the_measured_words(cluster: Cluster) -> None:
    submit(cluster, job(script(WAIT, "exit 78")))
    until(lambda: condition(cluster, "Failed") is not None)
    failed = condition(cluster, "Failed")
    assert failed is not None
    assert failed["reason"] == "PodFailurePolicy"
    assert "failed with exit code 78 matching FailJob rule at index 1" in failed["message"]
    assert cluster.pods("j", "Running") == []


def test_exit_code_1_counts_per_index_and_the_other_index_runs_on(cluster: Cluster) -> None:
    submit(cluster, job(script(WAIT, "exit 1")))
    until(lambda: cluster.job("j")["status"].get("failedIndexes") == "1")
    assert sorted(notes(pod) for pod in cluster.pods("j", "Failed") if pod["spec"]["hostname"] == "j-1")[-1] == (2, 0)
    assert [pod["spec"]["hostname"] for pod in running(cluster, 1)] == ["j-0"]
    assert condition(cluster, "Failed") is None


def test_no_failed_index_allowed_ends_the_rest(cluster: Cluster) -> None:
    submit(cluster, job(script(WAIT, "exit 1"), backoffLimitPerIndex=0, maxFailedIndexes=0))
    until(lambda: condition(cluster, "Failed") is not None)
    failed = condition(cluster, "Failed")
    assert failed is not None
    assert failed["reason"] == "MaxFailedIndexesExceeded"


def test_exit_code_75_counts_nothing_and_still_doubles_the_delay(cluster: Cluster) -> None:
    submit(cluster, job(script(WAIT, "sleep 0.05; exit 75")))
    until(lambda: any(notes(pod) == (0, 3) for pod in cluster.pods("j")))
    assert "failed" not in cluster.job("j")["status"]
    ends = [pod for pod in cluster.pods("j") if pod["spec"]["hostname"] == "j-1"]
    begun = sorted(pod["metadata"]["creationTimestamp"] for pod in ends)
    assert len(begun) >= 3
    assert condition(cluster, "FailureTarget") is None


@pytest.mark.parametrize("code", [1, 78, 143])
def test_an_eviction_is_ignored_whatever_the_exit_code(cluster: Cluster, code: int) -> None:
    submit(cluster, job(WAIT.replace("143", str(code))))
    first = running(cluster)[1]
    cluster.evict(first)
    assert notes(replaced(cluster, 1, first)) == (0, 1)
    assert "failed" not in cluster.job("j")["status"]


def test_an_eviction_with_exit_code_78_fails_the_job_where_that_rule_comes_first(cluster: Cluster) -> None:
    submit(cluster, job(WAIT.replace("143", "78"), rules=[FAIL_78, IGNORE_DISRUPTION, IGNORE_CODES]))
    cluster.evict(running(cluster)[1])
    until(lambda: condition(cluster, "Failed") is not None)


def test_an_eviction_with_exit_code_0_ends_the_index_for_good(cluster: Cluster) -> None:
    submit(cluster, job(WAIT.replace("143", "0")))
    cluster.evict(running(cluster)[1])
    until(lambda: cluster.job("j")["status"].get("completedIndexes") == "1")
    assert [pod["spec"]["hostname"] for pod in running(cluster, 1)] == ["j-0"]


def test_a_deleted_pod_that_ends_with_143_is_ignored(cluster: Cluster) -> None:
    submit(cluster, job(WAIT))
    first = running(cluster)[1]
    cluster.delete(first)
    assert notes(replaced(cluster, 1, first)) == (0, 1)


def test_a_deleted_pod_that_is_killed_after_its_grace_counts(cluster: Cluster) -> None:
    submit(cluster, job("trap '' TERM; while :; do sleep 0.05; done"))
    first = running(cluster)[1]
    cluster.delete(first, grace_s=0.1)
    assert notes(replaced(cluster, 1, first)) == (1, 0)


def test_two_evicted_at_once_come_back_after_one_delay(cluster: Cluster) -> None:
    submit(cluster, job(WAIT, pods=3))
    pods = running(cluster, 3)
    for pod in pods[1:]:
        cluster.evict(pod)
    assert [notes(replaced(cluster, index, pods[index])) for index in (1, 2)] == [(0, 1), (0, 1)]


def test_suspend_ends_pods_and_counts_nothing(cluster: Cluster) -> None:
    submit(cluster, job(WAIT))
    running(cluster)
    _change(cluster, suspend=True)
    until(lambda: condition(cluster, "Suspended") is not None and not cluster.pods("j", "Running"))
    assert "startTime" not in cluster.job("j")["status"]
    _change(cluster, suspend=False)
    assert [notes(pod) for pod in running(cluster)] == [(0, 0), (0, 0)]
    assert condition(cluster, "Suspended") is None


def test_a_job_grows_and_shrinks_from_the_highest_index(cluster: Cluster) -> None:
    submit(cluster, job(WAIT))
    running(cluster)
    _change(cluster, completions=3, parallelism=3)
    running(cluster, 3)
    _change(cluster, completions=1, parallelism=1)
    assert [pod["spec"]["hostname"] for pod in running(cluster, 1)] == ["j-0"]


def test_index_0_is_enough_where_the_policy_says_so(cluster: Cluster) -> None:
    submit(cluster, job(script("sleep 0.1", WAIT), successPolicy={"rules": [{"succeededIndexes": "0"}]}))
    until(lambda: condition(cluster, "Complete") is not None)
    assert cluster.pods("j", "Running") == []


def test_the_deadline_ends_it(cluster: Cluster) -> None:
    submit(cluster, job(WAIT, activeDeadlineSeconds=5))
    until(lambda: condition(cluster, "Failed") is not None)
    failed = condition(cluster, "Failed")
    assert failed is not None
    assert failed["reason"] == "DeadlineExceeded"


def test_removal_in_the_foreground_takes_along_what_the_job_owns(cluster: Cluster) -> None:
    submit(cluster, job(WAIT))
    running(cluster)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": cluster.job("j")["metadata"]["uid"]}
    thing = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "s", "ownerReferences": [owner]}, "data": {}}
    cluster.server.create(("configmaps", "default", "s"), thing)
    cluster.server.delete(("jobs", "default", "j"), {"propagationPolicy": "Foreground"}, {})
    until(lambda: cluster.store.list("jobs") == [])
    assert cluster.store.list("configmaps") == []
    assert cluster.pods() == []


def lost(cluster: Cluster) -> dict[str, Any]:
    """A pod that hangs in Terminating on a node that is silent."""
    submit(cluster, job(WAIT))
    pod = running(cluster)[1]
    cluster.nodes[pod["spec"]["nodeName"]].die()
    until(lambda: "deletionTimestamp" in cluster.store.get(("pods", "default", pod["metadata"]["name"]))["metadata"])
    return pod


def test_a_lost_node_leaves_its_pod_terminating_and_nothing_in_its_place(cluster: Cluster) -> None:
    pod = lost(cluster)
    until(lambda: cluster.job("j")["status"].get("terminating") == 1)
    seen = cluster.store.get(("pods", "default", pod["metadata"]["name"]))
    reasons = [each.get("reason") for each in seen["status"]["conditions"] if each["type"] == "DisruptionTarget"]
    assert reasons == ["DeletionByTaintManager"]
    assert len(cluster.pods("j")) == 2


def test_force_deletion_alone_does_not_help(cluster: Cluster) -> None:
    pod = lost(cluster)
    cluster.delete(pod, grace_s=0)
    synced = cluster.store.version
    _change(cluster, activeDeadlineSeconds=10**6)
    until(lambda: cluster.store.version > synced)
    assert cluster.store.get(("pods", "default", pod["metadata"]["name"]))["status"]["phase"] == "Running"
    assert len(cluster.pods("j")) == 2


@pytest.mark.parametrize("way", [Cluster.out_of_service, Cluster.remove_node])
def test_a_node_that_is_declared_gone_frees_its_index(cluster: Cluster, way: Callable[[Cluster, str], None]) -> None:
    pod = lost(cluster)
    way(cluster, pod["spec"]["nodeName"])
    assert notes(replaced(cluster, 1, pod)) == (0, 1)


def test_a_pod_that_fits_nowhere_says_why(cluster: Cluster) -> None:
    made = job(WAIT)
    container = made["spec"]["template"]["spec"]["containers"][0]
    container["resources"] = {"limits": {"nvidia.com/gpu": "8"}}
    submit(cluster, made)
    until(lambda: len(cluster.pods("j", "Pending")) == 2 and bool(cluster.pods("j")[0]["status"]["conditions"]))
    said_ = cluster.pods("j")[0]["status"]["conditions"][0]
    assert (said_["reason"], said_["message"]) == (
        "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")  # fmt: skip
    until(lambda: said(cluster, "Pod").get("FailedScheduling") == said_["message"])


def test_a_process_that_ends_takes_its_children_along(cluster: Cluster) -> None:
    submit(cluster, job(script("setsid sleep 300 & sleep 0.1; exit 1", WAIT), backoffLimitPerIndex=0))
    until(lambda: cluster.job("j")["status"].get("failedIndexes") == "0")
    (ended,) = [pod for pod in cluster.pods("j", "Failed") if pod["spec"]["hostname"] == "j-0"]
    assert marked(f"{ended['spec']['nodeName']}/{os.getpid()}/{ended['metadata']['uid']}") == []


def test_more_memory_than_the_limit_ends_the_container(cluster: Cluster) -> None:
    made = job(script(WAIT, "awk 'BEGIN { while (1) text = text \"0123456789abcdef\" }'"))
    made["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "64Mi"}}
    submit(cluster, made)
    until(lambda: bool(ended := cluster.pods("j", "Failed")) and bool(ended[0]["status"]["containerStatuses"]))
    state = cluster.pods("j", "Failed")[0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["reason"], state["exitCode"]) == ("OOMKilled", 137)


def test_a_node_that_comes_back_without_its_processes_reports_them_failed(cluster: Cluster) -> None:
    pod = lost(cluster)
    cluster.add_node(pod["spec"]["nodeName"])
    assert notes(replaced(cluster, 1, pod)) == (0, 1)
    node = cluster.store.get(("nodes", "", pod["spec"]["nodeName"]))
    until(lambda: not cluster.store.get(("nodes", "", node["metadata"]["name"]))["spec"].get("taints"))


def test_a_quota_that_is_used_up_is_told_by_events_of_the_job_alone(cluster: Cluster) -> None:
    quota(cluster, pods="1")
    submit(cluster, job(WAIT))
    until(lambda: "FailedCreate" in said(cluster, "Job"))
    name = r'Error creating: pods "j-1-\w+" is forbidden: '
    assert re.fullmatch(name + "exceeded quota: team, requested: pods=1, used: pods=1, limited: pods=1",
                        said(cluster, "Job")["FailedCreate"])  # fmt: skip
    assert [pod["spec"]["hostname"] for pod in running(cluster, 1)] == ["j-0"]
    assert all(each["status"] != "True" for each in cluster.job("j")["status"].get("conditions", []))
    quota(cluster, pods="2")
    running(cluster, 2)


def test_under_a_quota_of_memory_a_pod_has_to_say_how_much_it_needs(cluster: Cluster) -> None:
    quota(cluster, **{"requests.memory": "1Gi"})
    submit(cluster, job(WAIT))
    until(lambda: "FailedCreate" in said(cluster, "Job"))
    assert said(cluster, "Job")["FailedCreate"].endswith("failed quota: team: must specify requests.memory for: c")


def test_events_tell_of_places_starts_ends_and_evictions(cluster: Cluster) -> None:
    submit(cluster, job(script(WAIT, "sleep 0.1; exit 78")))
    until(lambda: condition(cluster, "Failed") is not None)
    of_pods = {"Scheduled", "Pulled", "Created", "Started", "Killing"}
    until(lambda: of_pods <= set(said(cluster, "Pod")))
    assert re.fullmatch(r"Successfully assigned default/j-\d-\w+ to n\d", said(cluster, "Pod")["Scheduled"])
    assert said(cluster, "Pod")["Killing"] == "Stopping container c"
    until(lambda: {"SuccessfulCreate", "SuccessfulDelete", "PodFailurePolicy"} <= set(said(cluster, "Job")))
    assert "matching FailJob rule at index 1" in said(cluster, "Job")["PodFailurePolicy"]


def test_events_tell_of_a_node_that_is_lost(cluster: Cluster) -> None:
    pod = lost(cluster)
    name = pod["metadata"]["name"]
    assert said(cluster, "Pod")["TaintManagerEviction"] == f"Marking for deletion Pod default/{name}"
    assert said(cluster, "Pod")["NodeNotReady"] == "Node is not ready"
    node = pod["spec"]["nodeName"]
    assert said(cluster, "Node")["NodeNotReady"] == f"Node {node} status is now: NodeNotReady"


def said(cluster: Cluster, kind: str) -> dict[str, str]:
    """The last message of each reason."""
    events = [event for event in cluster.store.list("events") if event["involvedObject"]["kind"] == kind]
    for event in events:
        admit(event)
    return {event["reason"]: event["message"] for event in events}


def quota(cluster: Cluster, **hard: str) -> None:
    key = ("resourcequotas", "default", "team")
    made = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": {"hard": hard}}
    if cluster.store.has(key):
        cluster.store.remove(key)
    cluster.server.create(key, made)


def _change(cluster: Cluster, **spec: Any) -> None:
    with cluster.store.changed:
        thing = cluster.job("j")
        thing["spec"] |= spec
        cluster.store.put(("jobs", "default", "j"), thing)

"""`everstep doctor job=k8s`: one line for each thing that is wrong, with the key to change, by few questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everstep.launch.__main__ import main
from everstep.launch.cli import doctor
from everstep.launch.schedulers.kubernetes.doctor import Doctor
from support.kube.cluster import Cluster
from support.kube.object_store import Plain
from support.kube.shell_pods import WAIT, config, submitted
from support.processes import until

pytestmark = pytest.mark.cluster
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
Look = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def look(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Look:
    """The exit code, and what is not well."""

    def run(*words: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main(["doctor", "job=k8s", "job.nproc=1", "job.gpus=0", *words])
        lines = capsys.readouterr().out.splitlines()
        return code, [line for line in lines if not line.startswith("ok ")]

    return run


def there(cluster: Cluster, plural: str, name: str, namespace: str = "default", **fields: Any) -> None:
    cluster.store.create((plural, namespace, name), {"kind": plural, "metadata": {"name": name}, **fields})


def test_a_cluster_that_can_take_the_job_is_asked_few_questions(cluster: Cluster, look: Look) -> None:
    there(cluster, "persistentvolumeclaims", "runs", spec={"accessModes": ["ReadWriteMany"]}, status={"phase": "Bound"})
    assert look("job.nodes=3", "job.k8s.claims.runs=/runs", "job.mem=16G") == (0, [])
    assert cluster.server.requests == [
        "GET /version", "GET /api/v1/namespaces/default", "POST /apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        "GET /api/v1/namespaces/default/resourcequotas", "GET /api/v1/namespaces/default/persistentvolumeclaims",
        "GET /api/v1/nodes", "GET /api/v1/namespaces/default/pods"]  # fmt: skip


def test_the_server_and_its_version_are_named(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "job=k8s"]) == 0
    assert f"{cluster.server.url}, Kubernetes v1.36.2" in capsys.readouterr().out.splitlines()[0]


def test_a_server_that_is_away_is_one_line(cluster: Cluster) -> None:
    with cluster.away(), pytest.raises(doctor.ConfigError, match=r"the API server http://\S+ has not answered for"):
        list(Doctor(doctor.job_config({"scheduler": "k8s"}), retry_s=0.5).findings())


def test_a_namespace_that_is_not_there_is_said(look: Look) -> None:
    code, wrong = look("job.k8s.namespace=elsewhere")
    assert (code, len(wrong)) == (2, 1)
    assert "there is no namespace elsewhere; change job.k8s.namespace" in wrong[0]


def test_rights_that_are_missing_are_named_with_the_file_that_grants_them(cluster: Cluster, look: Look) -> None:
    cluster.server.rights.denied |= {("batch", "jobs", "create"), ("batch", "jobs", "delete"), ("", "pods", "watch")}
    code, wrong = look()
    assert code == 2
    assert len(wrong) == 2
    assert "may not create, delete jobs.batch" in wrong[0]
    assert "may not watch pods" in wrong[1]
    assert all("kubectl apply -n default -f k8s/rbac.yaml" in line for line in wrong)


def test_rights_that_the_list_of_rules_leaves_out_are_asked_for_one_by_one(cluster: Cluster, look: Look) -> None:
    cluster.server.rights.hides = True
    cluster.server.rights.denied.add(("", "services", "create"))
    code, wrong = look()
    assert (code, len(wrong)) == (2, 1)
    assert "may not create services" in wrong[0]


def test_what_may_not_be_seen_is_said_and_is_no_problem(cluster: Cluster, look: Look) -> None:
    cluster.server.rights.denied |= {("", "nodes", "list"), ("", "resourcequotas", "list"), ("", "namespaces", "get")}
    code, unknown = look()
    assert code == 0
    assert [line.split()[:2] for line in unknown] == [["warn", "quota"], ["warn", "nodes"]]


def test_a_quota_is_held_against_the_job(cluster: Cluster, look: Look) -> None:
    there(
        cluster,
        "resourcequotas",
        "team",
        status={"hard": {"requests.memory": "64Gi"}, "used": {"requests.memory": "40Gi"}},
    )
    assert look("job.mem=16G") == (0, [])
    code, wrong = look("job.mem=16G", "job.nodes=2")
    assert code == 2
    assert "quota team: of requests.memory 64Gi 40Gi are used, and 2 pods ask for 32Gi; change job.mem" in wrong[0]


def test_gpus_that_no_node_has_are_said(look: Look) -> None:
    code, wrong = look("job.gpus=8")
    assert code == 2
    assert "job.gpus: a pod asks for 8 of nvidia.com/gpu, and nodes have at most 0; change job.gpus" in wrong[0]


def test_gpus_that_a_node_made_on_demand_may_have_are_no_problem(cluster: Cluster, look: Look) -> None:
    cluster.server.rights.groups |= {"karpenter.sh": ["v1"]}
    code, unknown = look("job.gpus=8")
    assert code == 0
    assert "and nodes have at most 0; change job.gpus (Karpenter may make nodes on demand)" in unknown[0]


@pytest.mark.parametrize(("words", "said"), [
    (["job.kind=jobset"], "this cluster has no JobSet (jobset.x-k8s.io/v1alpha2); install it, or change job.kind"),
    (["job.kind=trainjob"], "this cluster has no TrainJob (trainer.kubeflow.org/v1alpha1)"),
    (["job.queue=research"], "this cluster has no Kueue: the job would wait for ever; leave out job.queue"),
])  # fmt: skip
def test_what_is_not_installed_is_said(look: Look, words: list[str], said: str) -> None:
    code, wrong = look(*words)
    assert (code, len(wrong)) == (2, 1)
    assert said in wrong[0]


def test_a_jobset_and_a_queue_that_are_there_are_no_problem(cluster: Cluster, look: Look) -> None:
    cluster.server.rights.groups |= {"jobset.x-k8s.io": ["v1alpha2"], "kueue.x-k8s.io": ["v1beta2", "v1beta1"]}
    code, wrong = look("job.kind=jobset", "job.queue=research")
    assert (code, len(wrong)) == (2, 1)
    assert "there is no queue research in namespace default; change job.queue" in wrong[0]
    there(cluster, "localqueues", "research", status={"conditions": [{"type": "Active", "status": "True"}]})
    assert look("job.kind=jobset", "job.queue=research") == (0, [])
    there(cluster, "localqueues", "stopped", status={"conditions": [
        {"type": "Active", "status": "False", "message": "ClusterQueue is stopped"}]})  # fmt: skip
    assert "queue stopped starts nothing: ClusterQueue is stopped" in look("job.queue=stopped")[1][0]


@pytest.mark.parametrize(("claim", "said"), [
    (None, "there is no claim runs in namespace default"),
    ({"spec": {"accessModes": ["ReadWriteOnce"]}}, "claim runs is ReadWriteOnce: pods on several nodes"),
    ({"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Lost"}}, "the volume of claim runs is gone"),
    ({"spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "fast"}, "status": {"phase": "Pending"}},
     "claim runs waits for storage class fast, which is not there"),
])  # fmt: skip
def test_a_claim_that_pods_cannot_mount_is_said(cluster: Cluster, look: Look, claim: Plain | None, said: str) -> None:
    if claim is not None:
        there(cluster, "persistentvolumeclaims", "runs", **claim)
    code, wrong = look("job.nodes=2", "job.k8s.claims.runs=/runs")
    assert (code, len(wrong)) == (2, 1)
    assert f"job.k8s.claims.runs: {said}" in wrong[0]
    assert wrong[0].endswith("; change job.k8s.claims.runs")


def test_a_claim_that_waits_for_its_first_pod_is_no_problem(cluster: Cluster, look: Look) -> None:
    there(cluster, "storageclasses", "fast", namespace="")
    there(cluster, "persistentvolumeclaims", "runs", status={"phase": "Pending"},
          spec={"accessModes": ["ReadWriteMany"], "storageClassName": "fast"})  # fmt: skip
    assert look("job.k8s.cache_claim=runs") == (0, [])


def test_the_delay_of_each_index_is_told_and_a_long_one_is_wrong(
    cluster: Cluster, look: Look, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, handle = submitted(cluster, config(tmp_path, WAIT))
    name = handle.id.rsplit("/", 1)[-1]
    first = next(pod for pod in cluster.pods() if pod["spec"]["hostname"].endswith("-0"))
    cluster.evict(first)
    uid = first["metadata"]["uid"]
    until(lambda: [pod["metadata"]["uid"] != uid for pod in cluster.pods(phase="Running")] == [True, True])
    assert look() == (0, [])
    main(["doctor", "job=k8s"])
    assert f"{name}: pods would be started again after: 0 20 s, 1 10 s" in capsys.readouterr().out
    code, wrong = look("job.k8s.restart_delay_s=15")
    assert code == 2
    assert "0 20 s, 1 10 s; when one is lost, everstep resume makes a new job" in wrong[0]


def test_a_pod_on_a_lost_node_is_given_up_only_when_told(cluster: Cluster, look: Look, tmp_path: Path) -> None:
    submitted(cluster, config(tmp_path, WAIT))
    lost = cluster.pods()[0]["spec"]["nodeName"]
    pod = cluster.pods()[0]["metadata"]["name"]
    cluster.nodes[lost].die()
    until(lambda: any("hang in Terminating" in line for line in look()[1]))
    code, wrong = look()
    assert code == 2
    assert f"{pod} hang in Terminating on {lost}, and deleting them by force does not help" in wrong[0]
    assert f"everstep doctor job=k8s --out-of-service {lost}" in wrong[0]
    assert OUT_OF_SERVICE not in str(cluster.store.get(("nodes", "", lost)))
    assert look("--out-of-service", lost) == (0, [])
    until(lambda: [pod["spec"]["nodeName"] != lost for pod in cluster.pods(phase="Running")] == [True, True])


def test_a_node_that_is_alive_is_not_taken_out_of_service(
    cluster: Cluster, look: Look, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look("--out-of-service", "n0") == (2, [])
    assert look("--out-of-service", "n9") == (2, [])
    assert "taints" not in cluster.store.get(("nodes", "", "n0"))["spec"]

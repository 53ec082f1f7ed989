"""What a job becomes in Kubernetes: golden files, the schemas of two versions, and what no file shows at a glance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep.errors import ConfigError
from everstep.launch.config import job_config
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.kubernetes.labels import job_name, slug
from everstep.launch.schedulers.kubernetes.manifest import manifest, objects
from everstep.launch.schedulers.kubernetes.strategic_merge import merge
from everstep.security.job_secrets import TOKEN

GOLDEN = Path(__file__).parent.parent / "golden/kubernetes"
VERSIONS = ("1.31", "1.37")
PROGRAM = Program(
    "demo", "s3://runs/demo", ("-m", "everstep.trainer", "--frozen", "s3://runs/demo"), "everstep-1", "steps: 5\n"
)
FULL: dict[str, Any] = {
    "nodes": "2:4", "nproc": 8, "time": "1d", "image": "registry/train:1", "mem": "512G", "cpus": 64,
    "exclude": ["n7"], "env": {"NCCL_DEBUG": "WARN"}, "secrets": ["WANDB_API_KEY"], "queue": "research",
    "k8s": {
        "namespace": "team", "service_account": "trainer", "secret": "keys", "image_pull_secrets": ["pull"],
        "priority_class": "high", "queue_priority": "urgent", "node_selector": {"gpu": "h100"},
        "tolerations": [{"key": "spot", "operator": "Exists"}], "topology": "topology.kubernetes.io/zone",
        "rdma_resource": "rdma/hca", "rdma_count": 8, "shm_gb": 64, "scratch_gb": 200, "cache_claim": "shards",
        "claims": {"datasets": "/data"},
    },
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"nodes": 3, "nproc": 2, "gpus": 0, "image": "registry/train:1", "mem": "16G"},
    "full": FULL,
    "jobset": {**FULL, "kind": "jobset"},
    "trainjob": {**FULL, "kind": "trainjob"},
}


def made(**keys: Any) -> list[dict[str, Any]]:
    return objects(job_config({"scheduler": "k8s", "python": "python", **keys}), PROGRAM)


def pod(thing: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = thing["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("name", JOBS)
def test_the_manifest_is_as_it_was_when_somebody_last_looked_at_it(name: str) -> None:
    """EVERSTEP_GOLDEN=write makes the files anew; look at the difference before you keep it."""
    file, shown = GOLDEN / f"{name}.yaml", manifest(made(**JOBS[name]))
    if os.environ.get("EVERSTEP_GOLDEN") == "write":
        file.write_text(shown)
    assert file.read_text() == shown


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["plain", "full"])
def test_kubernetes_own_schemas_know_every_field(name: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for thing in made(**JOBS[name]):
        assert validate.validate(thing, version, strict=True) == version


def test_the_published_model_of_a_jobset_loses_nothing_of_ours() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    jobset = made(**JOBS["jobset"])[-1]
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset


def test_the_published_model_of_a_trainjob_loses_nothing_of_ours() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    trainjob = made(**JOBS["trainjob"])[-1]
    assert models.TrainerV1alpha1TrainJob.from_dict(trainjob).to_dict() == trainjob


def test_the_text_is_what_the_objects_are_and_the_same_each_time() -> None:
    text = manifest(made(**FULL))
    assert list(yaml.safe_load_all(text)) == made(**FULL)
    assert text == manifest(made(**FULL))


def test_a_disruption_is_ignored_before_any_exit_code_is_looked_at() -> None:
    rules = made(**JOBS["plain"])[-1]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "FailJob", "Ignore"]
    assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert [rule["onExitCodes"]["values"] for rule in rules[1:]] == [[78], [75, 143]]


def test_only_a_queue_suspends_a_job() -> None:
    assert "suspend" not in made(**JOBS["plain"])[-1]["spec"]
    assert made(**JOBS["plain"], queue="research")[-1]["spec"]["suspend"] is True


def test_the_settings_are_named_by_what_they_hold() -> None:
    name = made(**JOBS["plain"])[0]["metadata"]["name"]
    assert made(**JOBS["plain"])[0]["metadata"]["name"] == name
    assert made(**JOBS["plain"], grace_s=90)[0]["metadata"]["name"] != name


def test_the_value_of_a_secret_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-value")
    for name in JOBS:
        text = manifest(made(**{**JOBS[name], "secrets": ["WANDB_API_KEY"], "k8s": {"secret": "keys"}}))
        assert "planted-value" not in text
        assert "secretKeyRef" in text


RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
                      "secret"}  # fmt: skip


def pods_of(thing: dict[str, Any]) -> dict[str, Any]:
    """The spec of the pods of any kind; of a TrainJob what its patch says of them."""
    spec: dict[str, Any] = thing["spec"]
    if thing["kind"] == "TrainJob":
        spec = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    if thing["kind"] != "Job":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    found: dict[str, Any] = spec["template"]["spec"]
    return found


def against_restricted(spec: dict[str, Any]) -> list[str]:
    """What Pod Security "restricted" would refuse, by the rules that its documentation lists."""
    pod, containers = spec.get("securityContext", {}), [*spec["containers"], *spec.get("initContainers", [])]
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += [volume["name"] for volume in spec["volumes"] if not RESTRICTED_VOLUMES & set(volume)]
    for container in containers:
        own = container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        rules = {
            "runAsNonRoot": own.get("runAsNonRoot", pod.get("runAsNonRoot")) is True,
            "runAsUser": own.get("runAsUser", pod.get("runAsUser")) != 0,
            "seccompProfile": own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") in (
                "RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "privileged": not own.get("privileged"),
            "drop": "ALL" in capabilities.get("drop", []),
            "add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }  # fmt: skip
        found += [f"{container['name']}: {rule}" for rule, kept in rules.items() if not kept]
    options = {*pod, *(key for each in containers for key in each.get("securityContext", {}))}
    return found + sorted(options & {"seLinuxOptions", "sysctls", "windowsOptions"})


@pytest.mark.parametrize("name", JOBS)
def test_the_pods_of_every_kind_pass_restricted_unless_they_need_rdma(name: str) -> None:
    keys = {**JOBS[name], "k8s": {**JOBS[name].get("k8s", {}), "rdma_resource": None}}
    assert against_restricted(pods_of(made(**keys)[-1])) == []
    keys["k8s"]["rdma_resource"] = "rdma/hca"
    (container,) = pods_of(made(**keys)[-1])["containers"]
    assert against_restricted(pods_of(made(**keys)[-1])) == [f"{container['name']}: add"]
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


@pytest.mark.parametrize(("change", "said"), [
    ({"hostNetwork": True}, "hostNetwork"),
    ({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}, "h"),
    ({"securityContext": {}}, "train: runAsNonRoot"),
    ({"containers": [{"name": "side"}]}, "side: allowPrivilegeEscalation"),
])  # fmt: skip
def test_what_restricted_refuses_is_seen(change: dict[str, Any], said: str) -> None:
    assert said in against_restricted({**pods_of(made(**JOBS["plain"])[-1]), **change})


def test_names_fit_whatever_the_run_is_called() -> None:
    for name in ("A_b.C", "9lives", "x" * 200, "ünï", "-"):
        made_up = job_name(Program(name, "s3://r", (), "t"))
        assert len(f"{made_up}-node-0-1023") <= 63
        assert slug(made_up) == made_up
    assert job_name(PROGRAM) != job_name(Program("demo", "s3://runs/demo", (), "everstep-2"))


def test_the_overlay_has_the_last_word(tmp_path: Path) -> None:
    patch = {"spec": {"backoffLimitPerIndex": 9, "template": {"spec": {
        "schedulerName": "volcano", "subdomain": None,
        "containers": [{"name": "train", "env": [{"name": "HOME", "value": "/home"}]}, {"name": "side", "image": "s"}],
        "volumes": [{"name": "cache", "$patch": "delete"}]}}}}  # fmt: skip
    (tmp_path / "patch.yaml").write_text(yaml.safe_dump(patch))
    main = made(**JOBS["plain"], k8s={"overlay": str(tmp_path / "patch.yaml")})[-1]
    spec = pod(main)
    assert (main["spec"]["backoffLimitPerIndex"], spec["schedulerName"], "subdomain" in spec) == (9, "volcano", False)
    train, side = spec["containers"]
    assert side == {"name": "side", "image": "s"}
    assert train["image"] == "registry/train:1"
    assert {"name": "HOME", "value": "/home"} in train["env"]
    assert "cache" not in [volume["name"] for volume in spec["volumes"]]


def test_an_overlay_that_cannot_be_merged_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an item of containers has no 'name'"):
        merge({"containers": [{"name": "train"}]}, {"containers": [{"image": "x"}]})
    with pytest.raises(ConfigError, match=r"job\.k8s\.overlay=.*No such file"):
        made(**JOBS["plain"], k8s={"overlay": str(tmp_path / "absent.yaml")})


@pytest.mark.process
def test_a_dry_run_is_yaml_for_kubectl_cheap_and_without_a_client(tmp_path: Path) -> None:
    words = ["submit", "--dry-run", "job=k8s", "job.nodes=2", "job.nproc=1", "job.gpus=0", "job.image=i", "run=demo",
             "experiment=digits", f"run_root={tmp_path}"]  # fmt: skip
    code = f"""import resource, sys
from everstep.launch.__main__ import main
code = main({words!r})
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, [m for m in ("lightkube", "httpx2", "torch") if m in sys.modules], file=sys.stderr)
sys.exit(code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert [each["kind"] for each in yaml.safe_load_all(done.stdout)] == [
        "ConfigMap",
        "Service",
        "NetworkPolicy",
        "Job",
    ]
    assert done.stderr.splitlines()[-1].endswith(" []"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_pods_of_the_job_may_connect_to_its_pods() -> None:
    for kind in ("job", "jobset", "trainjob"):
        *_, policy, main = made(**{**FULL, "kind": kind})
        label = "job-name" if kind == "job" else "jobset.sigs.k8s.io/jobset-name"
        pods = {"matchLabels": {label: main["metadata"]["name"]}}
        assert policy["spec"] == {
            "podSelector": pods, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": pods}]}]
        }  # fmt: skip


def test_the_token_of_a_job_stands_in_no_manifest_and_one_pod_needs_none() -> None:
    named = [each for each in pod(made(nodes=3, image="i")[-1])["containers"][0]["env"] if each["name"] == TOKEN]
    (main,) = (each for each in made(nodes=3, image="i") if each["kind"] == "Job")
    reference = {"name": f"{main['metadata']['name']}-token", "key": TOKEN, "optional": True}
    assert named == [{"name": TOKEN, "valueFrom": {"secretKeyRef": reference}}]
    assert TOKEN not in manifest(made(nodes=1, image="i"))

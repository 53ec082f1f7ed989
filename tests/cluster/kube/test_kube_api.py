"""What any cluster can show: these tests know a kubeconfig and nothing else. `make test-k8s KUBECONFIG=…` runs them on
yours, in a namespace of their own that is removed afterwards; else they run on the simulated one."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep.errors import ConfigError
from everstep.launch.__main__ import main
from everstep.launch.config import job_config
from everstep.launch.runs.lookup import find
from everstep.launch.runs.status import report
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.job import JobState
from everstep.launch.schedulers.kubernetes.client import KINDS, Refused
from everstep.launch.schedulers.kubernetes.manifest import objects
from everstep.launch.schedulers.kubernetes.scheduler import Kubernetes
from support.kube.place import WAIT, Place, place

pytestmark = pytest.mark.cluster
PLANTED = "planted-value-of-a-secret"
PROGRAM = Program("demo", "s3://runs/demo", ("-m", "everstep.trainer"), "everstep-1", "steps: 5\n")
PATHS = {"Job": "/apis/batch/v1", "ConfigMap": "/api/v1", "Service": "/api/v1",
         "NetworkPolicy": "/apis/networking.k8s.io/v1",
         "JobSet": "/apis/jobset.x-k8s.io/v1alpha2", "TrainJob": "/apis/trainer.kubeflow.org/v1alpha1"}  # fmt: skip
FULL: dict[str, Any] = {
    "nodes": "2:4", "time": "1d", "mem": "512G", "cpus": 64, "exclude": ["n7"], "env": {"NCCL_DEBUG": "WARN"},
    "gpus": 8, "secrets": ["WANDB_API_KEY"], "queue": "research",
    "k8s": {"service_account": "trainer", "secret": "keys", "image_pull_secrets": ["pull"], "shm_gb": 64,
            "node_selector": {"gpu": "h100"}, "tolerations": [{"key": "spot", "operator": "Exists"}],
            "topology": "topology.kubernetes.io/zone", "scratch_gb": 200, "claims": {"datasets": "/data"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def dry_run(there: Place, thing: dict[str, Any]) -> None:
    """What the server would say, and nothing is made."""
    plural = KINDS[thing["kind"]][2]
    path = f"{PATHS[thing['kind']]}/namespaces/{there.namespace}/{plural}"
    there.client.create(f"{path}?dryRun=All&fieldValidation=Strict", thing)


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
@pytest.mark.parametrize("keys", [{"nodes": 3, "gpus": 0}, FULL], ids=["plain", "full"])
def test_what_we_render_is_taken_wherever_it_is_known(there: Place, kind: str, keys: dict[str, Any]) -> None:
    job = job_config({"scheduler": "k8s", "nproc": 2, "image": "registry/train:1", "kind": kind, **keys})
    *before, main_object = objects(job, PROGRAM)
    for thing in before:
        dry_run(there, thing)
    groups = {"", *(each["name"] for each in (there.client.read("/apis") or {})["groups"])}
    if main_object["apiVersion"].rpartition("/")[0] in groups:
        dry_run(there, main_object)
    else:
        with pytest.raises(Refused) as error:
            dry_run(there, main_object)
        assert error.value.code == 404


def sound() -> dict[str, Any]:
    made = objects(job_config({"scheduler": "k8s", "nodes": 2, "nproc": 1, "gpus": 0, "image": "i"}), PROGRAM)[-1]
    return copy.deepcopy(made)


REFUSED: list[tuple[Callable[[dict[str, Any]], Any], int, str]] = [
    (lambda j: j["spec"]["template"]["spec"]["containers"][0].update(comand=["x"]), 400, "strict decoding error"),
    (lambda j: j["spec"].update(completions="2"), 400, ""),
    (lambda j: j["spec"].update(completionMode="Foo"), 422, "Unsupported value"),
    (lambda j: j["spec"]["podFailurePolicy"]["rules"][0].update(action="Bogus"), 422, "Unsupported value"),
    (lambda j: j["spec"]["template"]["spec"].update(restartPolicy="OnFailure"), 422, 'only "Never" is supported'),
    (lambda j: j["spec"].update(podReplacementPolicy="TerminatingOrFailed"), 422, 'supported values: "Failed"'),
    (lambda j: j["spec"].update(completionMode="NonIndexed"), 422, "requires indexed completion mode"),
    (lambda j: j["spec"].update(maxFailedIndexes=3), 422, "must be less than or equal to completions"),
    (lambda j: j["spec"]["podFailurePolicy"]["rules"][2]["onExitCodes"].update(values=[143, 75]), 422, "be ordered"),
    (lambda j: j["spec"]["podFailurePolicy"]["rules"][2]["onExitCodes"].update(values=[0]), 422, "must not be 0"),
    (lambda j: j["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"].update(containerName="x"), 422, "one of the"),
    (lambda j: j["spec"].update(successPolicy={"rules": [{"succeededIndexes": "2"}]}), 422, "too large index"),
    (lambda j: j["metadata"].update(name="a.b"), 422, "invalid DNS label"),
    (lambda j: j["metadata"].update(name="x" * 62), 422, "invalid DNS label"),
]


@pytest.mark.parametrize(("change", "code", "said"), REFUSED)
def test_what_the_lint_leaves_to_the_server_is_refused(
    there: Place, change: Callable[[dict[str, Any]], Any], code: int, said: str
) -> None:
    made = sound()
    change(made)
    with pytest.raises(Refused, match=said or None) as error:
        dry_run(there, made)
    assert error.value.code == code


def test_what_the_server_takes_though_it_cannot_work_is_for_the_lint_to_say(there: Place) -> None:
    made = sound()
    made["spec"]["parallelism"] = 5
    made["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] = [300]
    dry_run(there, made)


def test_the_doctor_finds_nothing_wrong(there: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "job=k8s", "job.nproc=1", "job.gpus=0", f"job.k8s.namespace={there.namespace}"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert f"all that the launcher needs in namespace {there.namespace}" in printed


def test_gpus_that_no_node_has_are_found(there: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["job.nproc=1", "job.gpus=4096", f"job.k8s.namespace={there.namespace}"]
    assert main(["doctor", "job=k8s", *words]) == 2
    assert "change job.gpus" in capsys.readouterr().out


def test_a_job_is_made_once_found_evicted_and_removed_with_all_that_it_made(there: Place, tmp_path: Path) -> None:
    job = there.config(tmp_path)
    scheduler = Kubernetes(job)
    handle = scheduler.submit(there.rendered(job, "made"))
    assert scheduler.submit(there.rendered(job, "made")) == handle == scheduler.find("made")
    there.until(lambda: len(there.running()) == 2)
    assert scheduler.status([handle])[handle].state is JobState.running
    gone = there.running()[0]["metadata"]["uid"]
    there.evict(there.running()[0])
    there.until(lambda: [pod["metadata"]["uid"] != gone for pod in there.running()] == [True, True])
    assert scheduler.status([handle])[handle].restarts == 1
    scheduler.cancel([handle, handle])
    there.until(lambda: there.pods() == [] and there.jobs() == [])
    assert scheduler.status([handle])[handle].state is JobState.unknown


def test_a_job_that_is_followed_is_told_of_to_its_end(there: Place, tmp_path: Path) -> None:
    job = there.config(tmp_path, "echo everstep: the config cannot run; exit 78", nodes=1)
    scheduler = Kubernetes(job)
    handle = scheduler.submit(there.rendered(job, "followed"))
    with scheduler.follow() as ask:
        there.until(lambda: ask([handle])[handle].state.is_over)
        status = ask([handle])[handle]
    assert status.state is JobState.failed
    assert status.reason.startswith("everstep: the config cannot run (PodFailurePolicy")
    scheduler.cancel([handle])


def test_what_fits_nowhere_says_why(there: Place, tmp_path: Path) -> None:
    job = there.config(tmp_path, WAIT, nodes=1, gpus=4096)
    scheduler = Kubernetes(job)
    handle = scheduler.submit(there.rendered(job, "big"))
    there.until(lambda: "Insufficient nvidia.com/gpu" in scheduler.status([handle])[handle].reason)
    assert scheduler.status([handle])[handle].state is JobState.pending
    scheduler.cancel([handle])


def test_a_quota_that_is_used_up_is_said_with_its_name_and_what_is_left_of_it(there: Place, tmp_path: Path) -> None:
    there.until(lambda: there.pods() == [])
    there.make({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"},
                "spec": {"hard": {"pods": "1"}}})  # fmt: skip
    quota = f"/api/v1/namespaces/{there.namespace}/resourcequotas/team"
    there.until(lambda: "used" in (there.client.read(quota) or {}).get("status", {}))
    job = there.config(tmp_path, WAIT)
    scheduler = Kubernetes(job)
    handle = scheduler.submit(there.rendered(job, "third"))
    wanted = "waits for quota team (requested: pods=1, used: pods=1, limited: pods=1)"
    there.until(lambda: wanted in scheduler.status([handle])[handle].reason)
    there.client.remove(quota)
    there.until(lambda: len(there.running()) == 2)
    there.until(lambda: scheduler.status([handle])[handle].reason == "")
    scheduler.cancel([handle])


def test_what_the_server_refuses_is_one_line(there: Place, tmp_path: Path) -> None:
    job = there.config(tmp_path)
    made = list(yaml.safe_load_all(there.rendered(job, "refused").manifest))
    made[-1]["spec"]["completionMode"] = "Index"
    with pytest.raises(ConfigError, match=r"Kubernetes refuses it .422.: .*Unsupported value"):
        there.client.apply(made[-1])


@pytest.mark.process
def test_two_launchers_at_the_same_time_make_one_job(there: Place, tmp_path: Path) -> None:
    words = ["submit", "--quick", "job=k8s", "job.nproc=1", "job.gpus=0", "job.image=nowhere.invalid/none:1",
             "run=twice", f"job.k8s.namespace={there.namespace}", f"run_root={tmp_path}",
             f"job.k8s.claims.absent={tmp_path}", "experiment=digits"]  # fmt: skip
    children = [there.start(tmp_path, *words) for _ in range(2)]
    printed = ["".join(child.communicate(timeout=120)) for child in children]
    assert 0 in [child.returncode for child in children], printed
    named = [job for job in there.jobs() if job["metadata"]["name"].startswith("twice-")]
    assert len(named) == 1, printed
    there.everstep(tmp_path, "cancel", "twice", "--root", str(tmp_path))


@pytest.mark.process
@pytest.mark.timeout(900)
def test_a_training_loses_a_pod_ends_by_itself_and_tells_no_secret(
    there: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods and this machine have to see one run folder, and the image has to hold Everstep."""
    if not there.run_root:
        pytest.skip("RUN_ROOT is not set: a URL that the pods of IMAGE can write to")
    monkeypatch.setenv("EVERSTEP_TEST_KEY", PLANTED)  # where it is submitted, too
    secret = {"EVERSTEP_TEST_KEY": base64.b64encode(PLANTED.encode()).decode()}
    there.make({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "data": secret})
    run, root = f"trained-{there.namespace[-8:]}", ["--root", there.run_root]
    words = ["job.nodes=2", "job.nproc=1", "job.gpus=0", "job.grace_s=20", f"job.k8s.namespace={there.namespace}",
             "experiment=digits", "parallel=ddp", "steps=400", "checkpoint.every=50", "evaluate.every=null",
             "job.secrets=[EVERSTEP_TEST_KEY]", "job.k8s.secret=keys"]  # fmt: skip
    there.everstep(tmp_path, "submit", "job=k8s", *words, *there.words, f"run={run}", f"run_root={there.run_root}")

    def facts() -> dict[str, Any]:
        return report(find(run, there.run_root)).facts()

    there.until(lambda: (facts()["checkpoint_step"] or 0) > 0)
    there.evict(next(pod for pod in there.running() if pod["spec"]["hostname"].endswith("-1")))
    there.until(lambda: facts()["state"] in ("done", "failed", "lost"))
    assert (facts()["state"], facts()["step"]) == ("done", 400)
    assert ["preempted" in each["outcome"] for each in facts()["decisions"]][:1] == [True]
    assert "step 400" in there.everstep(tmp_path, "logs", run, "--rank", "0", *root)
    everything = there.told()
    secrets = there.client.items(f"/api/v1/namespaces/{there.namespace}/secrets")
    (token,) = (each["data"]["EVERSTEP_RUN_TOKEN"] for each in secrets if each["metadata"]["name"].startswith(run))
    assert token not in everything
    assert base64.b64decode(token).decode() not in everything
    assert "secretKeyRef" in everything
    assert '"reason": "SuccessfulCreate"' in everything
    assert PLANTED not in everything
    if there.root is not None:
        files = [file for file in (there.root / run).rglob("*") if file.is_file()]
        assert [file for file in files if PLANTED.encode() in file.read_bytes()] == []
        assert [file for file in files if base64.b64decode(token) in file.read_bytes()] == []
    assert PLANTED not in there.everstep(tmp_path, "status", run, "--json", *root)
    there.everstep(tmp_path, "cancel", run, *root)

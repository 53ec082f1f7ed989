"""Jobs on JobSet's and Kueue's own controllers: wherever a cluster has them, for they cannot be had otherwise.

`make test-k8s KUBECONFIG=…` runs these; without a cluster they are not even collected (conftest.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from everstep.launch.job_start.start_record import Start
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from support import ledger_toy
from support.kube.place import Place, place
from support.kube.runs import Run

pytestmark = [pytest.mark.process, pytest.mark.cluster, pytest.mark.timeout(900)]
TRAINING = ("steps=40", "checkpoint.every=4", "data.pause_s=0.1", "parallel=ddp", "job.nodes=2")
KUEUE, QUEUE = "kueue.x-k8s.io", "research"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("extensions")) as made:
        if made.root is None:
            pytest.skip("RUN_ROOT is no folder: these tests read what pods have noted in one that both see")
        made.root.mkdir(exist_ok=True)
        yield made


@pytest.fixture
def jobset(there: Place) -> None:
    if "jobset.x-k8s.io" not in groups(there):
        pytest.skip("this cluster has no JobSet")


@pytest.fixture(scope="module")
def queue(there: Place) -> Iterator[str]:
    """With room for one job of two pods; what its jobs ask for is CPUs."""
    if KUEUE not in groups(there):
        pytest.skip("this cluster has no Kueue")
    version = groups(there)[KUEUE]
    api, name = f"/apis/{KUEUE}/{version}", there.namespace
    flavor = {"name": name, "resources": [{"name": "cpu", "nominalQuota": 2}]}
    for path, kind, called, spec in (
        ("resourceflavors", "ResourceFlavor", name, {}),
        ("clusterqueues", "ClusterQueue", name,
         {"namespaceSelector": {}, "resourceGroups": [{"coveredResources": ["cpu"], "flavors": [flavor]}]}),
        (f"namespaces/{name}/localqueues", "LocalQueue", QUEUE, {"clusterQueue": name}),
    ):  # fmt: skip
        thing = {"apiVersion": f"{KUEUE}/{version}", "kind": kind, "metadata": {"name": called}, "spec": spec}
        there.client.create(f"{api}/{path}", thing)
    yield QUEUE
    there.client.remove(f"{api}/namespaces/{name}/localqueues/{QUEUE}")
    there.client.remove(f"{api}/clusterqueues/{name}")
    there.client.remove(f"{api}/resourceflavors/{name}")


def groups(there: Place) -> dict[str, str]:
    """API group → the version that the server prefers."""
    found: list[dict[str, Any]] = (there.client.read("/apis") or {})["groups"]
    return {each["name"]: each["preferredVersion"]["version"] for each in found}


def run_of(there: Place, name: str) -> Run:
    assert there.root is not None
    return Run(there, there.root, f"{name}-{there.namespace[-8:]}")


def said(run: Run) -> str:
    return run.everstep("status", run.name, "--root", str(run.root))


def inner(there: Place, run: Run) -> list[dict[str, Any]]:
    """The pods of a run, whoever has made them."""
    return [pod for pod in there.running() if pod["metadata"]["labels"].get("everstep.dev/run") == run.name]


@pytest.mark.usefixtures("jobset")
def test_a_jobset_that_loses_a_pod_trains_to_the_parameters_of_a_job_that_lost_none(there: Place) -> None:
    run, calm = run_of(there, "set"), run_of(there, "plain")
    run.submit(*TRAINING, "job.kind=jobset")
    there.until(lambda: ledger_toy.last_step(run.ledger) >= 8)
    assert "training" in said(run).split()
    lost = next(pod for pod in inner(there, run) if pod["spec"]["hostname"].endswith("-1"))
    there.evict(lost)
    there.until(lambda: "done" in said(run).split())
    assert Start.numbers(run.folder)[-1] == 2
    calm.submit(*TRAINING, "data.pause_s=0")
    calm.wait()
    assert ledger_toy.slots(run.ledger) == ledger_toy.slots(calm.ledger)
    assert list(differences(locate(run.folder.url), locate(calm.folder.url))) == []


@pytest.mark.usefixtures("jobset")
def test_cancel_takes_a_jobset_with_all_that_it_made(there: Place) -> None:
    run = run_of(there, "cancelled")
    run.submit(*TRAINING, "job.kind=jobset")
    there.until(lambda: ledger_toy.last_step(run.ledger) >= 2)
    run.everstep("cancel", run.name, "--root", str(run.root))
    run.until_gone()


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_the_second_job_of_a_full_queue_says_its_place_and_starts_when_the_first_is_over(
    there: Place, queue: str, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "jobset":
        request.getfixturevalue("jobset")
    asks = ["job.cpus=1", f"job.queue={queue}", f"job.kind={kind}", "steps=12"]
    first, second = run_of(there, f"first-{kind}"), run_of(there, f"second-{kind}")
    first.submit(*TRAINING, *asks)
    there.until(lambda: ledger_toy.last_step(first.ledger) >= 2)
    second.submit(*TRAINING, *asks)
    there.until(lambda: f"waits in queue {queue}, place 1 of 1: " in said(second))
    assert inner(there, second) == []
    there.until(lambda: "done" in said(first).split())
    there.until(lambda: "done" in said(second).split())
    assert Start.numbers(second.folder) == [1]

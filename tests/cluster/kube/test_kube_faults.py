"""Three pods train the toy, and lose one after the other: the same samples, the same parameters, nobody asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import ledger_toy
import pytest
from kube_cluster import Cluster
from kube_run import Run

from trainer.checkpoint.diff import differences
from trainer.checkpoint.restoring import locate

pytestmark = [pytest.mark.process, pytest.mark.cluster]
STEPS, PODS, SCALE = 40, 3, 0.05
KEYS = (f"steps={STEPS}", f"job.nodes={PODS}", "checkpoint.every=10", "data.pause_s=0.1", "parallel=ddp")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kube")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster.up(tmp_path, 5, SCALE) as made:
        yield made
    assert made.errors == []


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What all others have to come to."""
    with Cluster.up(tmp_path_factory.mktemp("cluster"), PODS, SCALE) as made:
        run = Run(made, root, "undisturbed")
        run.submit(*KEYS)
        run.wait()
    return run


@pytest.fixture
def run(cluster: Cluster, root: Path, request: pytest.FixtureRequest, undisturbed: Run) -> Run:
    made = Run(cluster, root, request.node.name.removeprefix("test_")[:30].replace("_", "-"))
    made.submit(*KEYS)
    made.wait_for_step(15)
    return made


def same(run: Run, undisturbed: Run) -> None:
    """Complete by itself, every sample of every step, and the parameters; no budget of any index was touched."""
    run.wait()
    assert ledger_toy.slots(run.ledger) == ledger_toy.slots(undisturbed.ledger)
    assert list(differences(locate(run.folder.url), locate(undisturbed.folder.url))) == []


def test_eviction_of_a_pod(run: Run, undisturbed: Run) -> None:
    run.cluster.evict(run.pod(1))
    same(run, undisturbed)
    assert run.cluster.job(run.job)["status"]["failed"] == 0


def test_eviction_of_the_pod_that_decides(run: Run, undisturbed: Run) -> None:
    run.cluster.evict(run.pod(0))
    same(run, undisturbed)


def test_eviction_of_two_at_once(run: Run, undisturbed: Run) -> None:
    for index in (0, 2):
        run.cluster.evict(run.pod(index))
    same(run, undisturbed)


def test_a_node_that_dies_without_a_word(run: Run, undisturbed: Run) -> None:
    lost = run.pod(2)["spec"]["nodeName"]
    run.cluster.nodes[lost].die()
    run.cluster.out_of_service(lost)
    same(run, undisturbed)


def test_a_node_that_is_drained(run: Run, undisturbed: Run) -> None:
    run.cluster.drain(run.pod(1)["spec"]["nodeName"])
    same(run, undisturbed)


def test_a_container_is_killed_for_its_memory_while_the_api_server_is_away_for_30_s(run: Run, undisturbed: Run) -> None:
    """30 s of the simulated cluster, scaled as all its times. Who follows comes back to a history that is gone."""
    server, follower = run.cluster.server, run.start("status", run.name, "-f", "--root", str(run.root))
    run.until(lambda: server.watches == 2, "watch of the job and of its pods")
    pod = run.pod(1)
    with run.cluster.away():
        back = time.monotonic() + 30 * SCALE
        run.cluster.kill_for_memory(pod)
        run.until(lambda: time.monotonic() > back, "end of the outage")
        run.cluster.store.touch()
        run.cluster.store.forget()
    same(run, undisturbed)
    assert server.gone == 2
    printed = follower.communicate(timeout=60)[0].splitlines()
    assert (follower.returncode, printed[-1].split()[0]) == (0, "done"), printed


def test_a_config_that_cannot_run_ends_the_job_at_once_and_status_says_why(cluster: Cluster, root: Path) -> None:
    run = Run(cluster, root, "mistaken")
    run.submit(*KEYS, "data.samples=none")
    run.wait("Failed")
    assert run.cluster.job(run.job)["status"]["failed"] <= PODS
    assert "failed: the config cannot run" in run.everstep("status", "mistaken", "--root", str(root))


def test_an_image_that_is_not_there_is_said_while_the_job_waits(cluster: Cluster, root: Path) -> None:
    run = Run(cluster, root, "imageless")
    run.submit(*KEYS, "job.image=bad")
    run.until(lambda: "ErrImagePull" in run.everstep("status", "imageless", "--root", str(root)), "reason")
    run.everstep("cancel", "imageless", "--root", str(root))
    run.until_gone()

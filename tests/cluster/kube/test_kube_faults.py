"""Three pods train the toy, and lose one after the other: the same samples, the same parameters, nobody asked.

One run suffers all faults, one after the other: to start three processes costs far more than all that they train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ledger_toy
import pytest
from kube_cluster import Cluster
from kube_run import Run

from launch.starts import Start
from trainer.checkpoint.diff import differences
from trainer.checkpoint.restoring import locate

pytestmark = [pytest.mark.process, pytest.mark.cluster]
STEPS, PODS, SCALE = 70, 3, 0.05
TRAINING = (f"steps={STEPS}", "checkpoint.every=4", "data.pause_s=0.1", "parallel=ddp")
KEYS = (f"job.nodes={PODS}", *TRAINING)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kube")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster.up(tmp_path, 5, SCALE) as made:
        yield made
    assert made.errors == []


def suffer(run: Run, step: int, fault: Callable[[], None], *indexes: int) -> None:
    """At a step. Afterwards all train again: those of `indexes` in new pods, the others in the old ones."""
    run.wait_for_step(step)
    before = {index: run.pod(index)["metadata"]["uid"] for index in range(PODS)}
    start = Start.numbers(run.folder)[-1]
    fault()
    for rank in range(PODS):
        began = f"start-{start + 1:04d}-rank-{rank}-"
        run.until(lambda began=began: ledger_toy.last_step(run.ledger, began) > 0, f"{began} after {fault}")  # type: ignore[misc]
    after = {index: run.pod(index)["metadata"]["uid"] for index in range(PODS)}
    assert {index for index in range(PODS) if before[index] != after[index]} == set(indexes)
    assert Start.numbers(run.folder)[-1] == start + 1


@pytest.mark.timeout(900)
def test_a_run_that_loses_its_pods_in_every_way_ends_like_one_that_lost_none(cluster: Cluster, root: Path) -> None:
    """Evictions of the pod that decides and of two at once, a node that dies without a word, one that is drained, and a
    container that is killed for its memory while the API server is away."""
    run = Run(cluster, root, "disturbed")
    run.submit(*KEYS)
    follower = run.start("status", run.name, "-f", "--root", str(root))
    run.until(lambda: cluster.server.watches == 2, "watch of the job and of its pods")

    def two_at_once() -> None:
        for pod in [run.pod(index) for index in (0, 2)]:
            cluster.evict(pod)

    def death() -> None:
        lost = run.pod(2)["spec"]["nodeName"]
        cluster.nodes[lost].die()
        cluster.out_of_service(lost)

    suffer(run, 6, lambda: cluster.evict(run.pod(0)), 0)
    suffer(run, 14, two_at_once, 0, 2)
    suffer(run, 22, death, 2)
    suffer(run, 30, lambda: cluster.drain(run.pod(1)["spec"]["nodeName"]), 1)
    assert cluster.job(run.job)["status"]["failed"] == 0
    suffer(run, 38, lambda: lose_memory_and_server(run), 1)
    run.wait()
    assert cluster.server.gone == 2
    printed = follower.communicate(timeout=60)[0].splitlines()
    assert (follower.returncode, printed[-1].split()[0]) == (0, "done"), printed
    # As many processes on one machine, which lose nothing.
    undisturbed = Run(cluster, root, "undisturbed")
    undisturbed.everstep("run", *undisturbed.words(*TRAINING, "job=local", f"job.nproc={PODS}"))
    same(run, undisturbed)


def lose_memory_and_server(run: Run) -> None:
    """For 30 s of the simulated cluster, scaled as all its times. Who follows comes back to a history that is gone."""
    pod = run.pod(1)
    with run.cluster.away():
        back = time.monotonic() + 30 * SCALE
        run.cluster.kill_for_memory(pod)
        run.until(lambda: time.monotonic() > back, "end of the outage")
        run.cluster.store.touch()
        run.cluster.store.forget()


def same(run: Run, other: Run) -> None:
    """Every sample of every step, and the parameters."""
    assert ledger_toy.slots(run.ledger) == ledger_toy.slots(other.ledger)
    assert list(differences(locate(run.folder.url), locate(other.folder.url))) == []


def test_a_config_that_cannot_run_ends_the_job_at_once_and_status_says_why(cluster: Cluster, root: Path) -> None:
    run = Run(cluster, root, "mistaken")
    run.submit(*KEYS, "job.nodes=2", "data.samples=none")
    run.wait("Failed")
    assert run.cluster.job(run.job)["status"]["failed"] <= 2
    assert "failed: the config cannot run" in run.everstep("status", "mistaken", "--root", str(root))


def test_an_image_that_is_not_there_is_said_while_the_job_waits(cluster: Cluster, root: Path) -> None:
    run = Run(cluster, root, "imageless")
    run.submit(*KEYS, "job.image=bad")
    run.until(lambda: "ErrImagePull" in run.everstep("status", "imageless", "--root", str(root)), "reason")
    run.everstep("cancel", "imageless", "--root", str(root))
    run.until_gone()

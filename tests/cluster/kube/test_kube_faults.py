"""Three pods train the toy, and lose one after the other: the same samples, the same parameters, nobody asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ledger_toy
import pytest
from kube_cluster import Cluster
from kube_run import Run

from trainer.checkpoint.checkpointer import locate
from trainer.checkpoint.diff import differences
from trainer.checkpoint.manifest import candidates

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
    paths = [locate(candidates(each.folder.storage.url)[0].path) for each in (run, undisturbed)]
    assert differences(*paths) == []


def test_eviction_of_a_pod(run: Run, undisturbed: Run) -> None:
    run.cluster.evict(run.pod(1))
    same(run, undisturbed)
    assert run.cluster.job(run.job)["status"]["failed"] == 0

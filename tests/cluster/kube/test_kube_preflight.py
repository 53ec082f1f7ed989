"""Before a job is given to Kubernetes: what cannot be built, and what no node has, is refused, and nothing is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.kube.cluster import Cluster
from support.kube.place import Place
from support.kube.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.process]
GPUS = "job.gpus: a pod asks for 8 of nvidia.com/gpu, and nodes have at most 0; change job.gpus"


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    there = Place(str(cluster.kubeconfig), "toy", str(tmp_path))
    cluster.store.create(("namespaces", "", there.namespace), {"metadata": {"name": there.namespace}})
    return Run(there, tmp_path, "demo")


def nothing_is_made(run: Run) -> bool:
    core = f"/api/v1/namespaces/{run.place.namespace}"
    return not Path(run.folder.url).exists() and not run.place.jobs() + run.place.client.items(f"{core}/configmaps")


def provider(run: Run, scheme: str) -> None:
    """Say of every node who has made it."""
    for node in run.place.client.items("/api/v1/nodes"):
        path = f"/api/v1/nodes/{node['metadata']['name']}"
        run.place.client.change(path, {"spec": {"providerID": f"{scheme}://zone/machine"}})


@pytest.mark.parametrize("verb", ["check", "submit"])
def test_gpus_that_no_node_has_are_one_line_with_the_key(run: Run, verb: str) -> None:
    said = run.everstep(verb, *run.words("job.gpus=8"), *(["--quick"] if verb == "check" else []), code=2)
    assert [line.partition(": ")[2] for line in said.splitlines()] == [GPUS]
    assert nothing_is_made(run)


def test_a_model_that_cannot_be_built_is_refused_before_anything_is_made(run: Run) -> None:
    said = run.everstep("submit", *run.words("task.widht=3"), code=2)
    assert "error: task.widht: " in said
    assert nothing_is_made(run)


@pytest.mark.parametrize("scheme", ["kind", "aws"])
def test_where_a_cloud_makes_nodes_on_demand_it_is_only_a_note(run: Run, scheme: str) -> None:
    provider(run, scheme)
    said = run.everstep("check", "--quick", *run.words("job.gpus=8"), code=2 if scheme == "kind" else 0)
    assert (f"everstep: {GPUS} (nodes of aws may be made on demand, so" in said) == (scheme == "aws")


def test_nodes_that_are_too_few_today_are_a_note_and_the_job_is_made(run: Run) -> None:
    said = run.submit("job.nodes=40", "job.mem=16G")
    assert "everstep: job.nodes=40: the nodes have places for " in said
    assert len(run.place.jobs()) == 1


def test_an_account_that_may_not_see_nodes_is_not_held_up(cluster: Cluster, run: Run) -> None:
    cluster.server.rights.denied.add(("", "nodes", "list"))
    said = run.everstep("check", "--quick", *run.words("job.gpus=8"))
    assert said.count("everstep:") == said.count("no problem found without torch") == 1


def test_a_job_that_fits_is_looked_at_and_made(run: Run) -> None:
    said = run.everstep("submit", *run.words("steps=4"))
    assert "parameters take" in said
    assert json.loads((Path(run.folder.url) / "submissions/0001.json").read_text())["scheduler"] == "k8s"

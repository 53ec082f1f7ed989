"""A pod that works in a folder full of files that are named as Everstep's trains as any other does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.outcome import Outcome
from support.kube.place import Place, place
from support.kube.runs import Run
from support.users_project import BUILT_IN, OWN, lay_out

pytestmark = [pytest.mark.process, pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Its pods are executed, not forked: how Python begins decides where imports come from."""
    with place(tmp_path_factory.mktemp("names"), 1) as made:
        if made.root is None:
            pytest.skip("RUN_ROOT is no folder: these tests need one that pods and this machine both see")
        yield made


@pytest.fixture(scope="module")
def project(there: Place) -> Path:
    """As an image with the user's code has it; the pods see it where the runs are."""
    assert there.root is not None
    folder = there.root / f"project-{there.namespace[-8:]}"
    folder.mkdir(parents=True)
    return lay_out(folder)


@pytest.fixture(scope="module")
def runs(there: Place, project: Path) -> dict[str, Run]:
    """Submitted from there, and both at once."""
    container = {"name": "train", "workingDir": str(project)}
    overlay = project / "overlay.yaml"
    overlay.write_text(json.dumps({"spec": {"template": {"spec": {"containers": [container]}}}}))
    made = {"own": OWN, "built_in": BUILT_IN}
    runs = {name: Run(there, project.parent, f"{name}-{there.namespace[-8:]}") for name in made}
    for name, run in runs.items():
        keys = ["job=k8s", "job.nproc=1", "job.gpus=0", f"job.k8s.namespace={there.namespace}", *there.words,
                f"job.k8s.overlay={overlay}", f"run={run.name}", f"run_root={run.root}"]  # fmt: skip
        there.everstep(project, "submit", *keys, *made[name])
    return runs


@pytest.mark.parametrize("name", ["own", "built_in"])
def test_a_pod_trains_to_its_end(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    run.wait()
    ending = run.folder.last_ending()
    assert ending is not None
    assert (ending.outcome, ending.step) == (Outcome.done, 4), run.printed()

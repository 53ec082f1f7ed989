"""A sweep whose trials are jobs on whatever cluster there is: the driver keeps to its limit, dies, and is followed by
another."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import warm
from support.kube.place import PATHS, PATIENCE_S, Place, place
from support.processes import until
from support.sweep_processes import REAL, TESTS, ended, ends, kill, results, sweep, told

pytestmark = [pytest.mark.process, pytest.mark.cluster, pytest.mark.timeout(900), pytest.mark.usefixtures("warm")]
GRID = ["optimizer.lr=0.01,0.1", "seed=0,1", "steps=12"]
PARALLEL = 2


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path, popen=warm.Popen) as made:
        if made.root is None:
            pytest.skip("RUN_ROOT is no folder: this test reads what trials have left in one that both see")
        made.root.mkdir(parents=True, exist_ok=True)
        yield made


def start(there: Place) -> subprocess.Popen[str]:
    assert there.root is not None
    code = there.root / "toy"  # pods find the toy where the runs are
    (code / "support").mkdir(parents=True, exist_ok=True)
    for file in ("__init__.py", "toy.py"):
        shutil.copy(TESTS / "support" / file, code / "support")
    words = ["--quick", "job=k8s", "job.nproc=1", "job.gpus=0", f"job.k8s.namespace={there.namespace}", *there.words,
             f"job.env.PYTHONPATH={code}:{PATHS}" if there.agents else f"job.env.PYTHONPATH={code}",
             f"job.max_parallel={PARALLEL}", "sweep.poll_s=0.2", "run=torn", f"run_root={there.root}/runs"]  # fmt: skip
    return sweep(REAL, there.root, *GRID, *words, KUBECONFIG=there.kubeconfig)


def test_trials_are_jobs_of_which_so_many_run_and_a_driver_that_died_is_followed_by_another(there: Place) -> None:
    root = there.root
    assert root is not None
    shutil.rmtree(root / "runs", ignore_errors=True)
    ended(sweep(REAL, root, *GRID, "run=calm", "job.max_parallel=2", "sweep.poll_s=0.05"))
    driver, seen = start(there), [0]

    def some_told() -> bool:
        seen.append(sum(not job.get("status", {}).get("conditions") for job in there.jobs()))
        return driver.poll() is not None or len(told(root, "torn")) >= 1

    until(some_told, PATIENCE_S)
    assert driver.poll() is None, driver.communicate()
    kill(driver)
    ended(start(there), seconds=PATIENCE_S)
    assert 1 <= max(seen) <= PARALLEL
    assert results(root, "torn") == results(root, "calm")
    assert sorted(told(root, "torn")) == [(trial, 0) for trial in range(4)]
    assert list(ends(root, "torn").values()) == [[12]] * 4

"""A sweep whose trials are jobs on Kubernetes: the driver keeps to its limit, dies, and is followed by another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kube_cluster import Cluster
from kube_run import PATHS
from process_helpers import until
from sweep_processes import REAL, ended, ends, kill, results, sweep, told

pytestmark = [pytest.mark.process, pytest.mark.cluster]
GRID = ["optimizer.lr=0.01,0.1", "seed=0,1", "steps=12"]
PARALLEL = 2


def start(cluster: Cluster, root: Path) -> subprocess.Popen[str]:
    words = ["job=k8s", "job.nproc=1", "job.gpus=0", "job.image=toy", "job.threads=1", f"job.python={sys.executable}",
             f"job.max_parallel={PARALLEL}", f"job.k8s.claims.runs={root}", f"job.env.PYTHONPATH={PATHS}",
             "job.env.GLOO_SOCKET_IFNAME=lo", "sweep.poll_s=0.2", "run=torn", f"run_root={root}/runs"]  # fmt: skip
    return sweep(REAL, root, *GRID, *words, KUBECONFIG=str(cluster.kubeconfig))


def test_trials_are_jobs_of_which_so_many_run_and_a_driver_that_died_is_followed_by_another(
    cluster: Cluster, tmp_path: Path
) -> None:
    ended(sweep(REAL, tmp_path, *GRID, "run=calm", "job.max_parallel=2", "sweep.poll_s=0.05"))
    driver, seen = start(cluster, tmp_path), [0]

    def some_told() -> bool:
        seen.append(sum(not job["status"].get("conditions") for job in cluster.store.list("jobs")))
        return driver.poll() is not None or len(told(tmp_path, "torn")) >= 1

    until(some_told, 120)
    assert driver.poll() is None, driver.communicate()
    kill(driver)
    ended(start(cluster, tmp_path), seconds=120)
    assert 1 <= max(seen) <= PARALLEL
    assert results(tmp_path, "torn") == results(tmp_path, "calm")
    assert sorted(told(tmp_path, "torn")) == [(trial, 0) for trial in range(4)]
    assert list(ends(tmp_path, "torn").values()) == [[12]] * 4

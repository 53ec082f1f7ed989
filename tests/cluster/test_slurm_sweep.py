"""Sweeps on a real Slurm: drivers and trials are killed, jobs go on, the next driver finds them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import PATHS, PATIENCE_S, TESTS
from process_helpers import until
from slurm_cluster import Cluster
from sweep_processes import CHEAP, ended, ends, kill, order, results, story, sweep, told

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
GRID = ["optimizer.lr=0.001,0.003,0.01,0.03,0.1,0.3", "seed=range(0,4)", "steps=20"]
PARALLEL = 12


def start(cluster: Cluster, root: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    known = ["--config-dir", str(TESTS / "conf"), "job=slurm", "job.nproc=1", "job.gpus=0", "job.flags=[--exclusive]",
             "job.time=1h", "job.grace_s=10", "experiment=toy", "sweep.poll_s=0.5"]  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "launch", "sweep", *known, *words], cwd=root, text=True,
                            env={**cluster.env, "PYTHONPATH": PATHS, **more}, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE)  # fmt: skip


def cheap(cluster: Cluster, root: Path, pause_s: float) -> subprocess.Popen[str]:
    """The driver of 24 trials that import no torch, with jobs that are real."""
    path = f"job.env.PYTHONPATH={TESTS / 'cluster/cheap'}{os.pathsep}{PATHS}"
    return start(cluster, root, *GRID, path, f"job.max_parallel={PARALLEL}", "run=torn", CHEAP_PAUSE_S=str(pause_s))


def trainers(root: Path) -> dict[str, int]:
    """Run folder → the process that trains it, on whichever node."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if "--frozen" in words and words[words.index("--frozen") + 1].startswith(str(root)):
                found[words[words.index("--frozen") + 1]] = int(entry.name)
    return found


def test_24_trials_whose_driver_and_jobs_are_killed_twice_end_like_those_of_a_sweep_that_was_left_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    ended(sweep(CHEAP, tmp_path, *GRID, "run=calm", "job.max_parallel=4", "sweep.poll_s=0.05"))
    draws = random.Random(0)
    killed = 0
    for results_first in sorted(draws.sample(range(1, 9), 2)):
        driver = cheap(cluster, tmp_path, 0.2)
        until(lambda: driver.poll() is not None or (len(told(tmp_path, "torn")) >= results_first  # noqa: B023
              and len(trainers(tmp_path)) >= PARALLEL // 2), PATIENCE_S)  # fmt: skip
        assert driver.poll() is None, driver.communicate()
        running = trainers(tmp_path)
        for url in draws.sample(sorted(running), len(running) // 2):
            with contextlib.suppress(ProcessLookupError):
                os.kill(running[url], signal.SIGKILL)
                killed += 1
        kill(driver)
    ended(cheap(cluster, tmp_path, 0), seconds=PATIENCE_S)
    assert results(tmp_path, "torn") == results(tmp_path, "calm")
    assert order(tmp_path, "torn") == order(tmp_path, "calm")
    assert set(map(tuple, ends(tmp_path, "torn").values())) == {(20,)}
    assert sorted(told(tmp_path, "torn")) == [(trial, 0) for trial in range(24)]
    trials = tmp_path / "runs/torn/trials"
    handles = [json.loads(file.read_text())["handle"] for file in trials.glob("*/submissions/*.handle.json")]
    assert len([handle for handle in handles if handle]) == 24  # of one that was killed before sbatch there is no job
    assert killed >= PARALLEL // 2
    assert len(list(trials.glob("*/attempts/*"))) > 24


def test_real_trainings_are_swept_as_jobs(cluster: Cluster, tmp_path: Path) -> None:
    words = [f"job.env.PYTHONPATH={PATHS}", "optimizer.lr=0.01,0.1", "steps=6", "job.max_parallel=2", "run=s"]
    printed = ended(start(cluster, tmp_path, *words), seconds=PATIENCE_S)
    assert "2 trials, 12 steps in all" in printed
    assert [trial.last.verdict.value for trial in story(tmp_path, "s").trials if trial.last] == ["done"] * 2
    assert list(ends(tmp_path, "s").values()) == [[6], [6]]

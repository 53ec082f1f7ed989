"""A sweep on a real Slurm: its driver is killed, jobs go on, the next driver finds them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import PATHS, PATIENCE_S, TESTS
from slurm_cluster import Cluster

from launch.sweep.records import SweepFolder
from launch.sweep.story import Story
from trainer.run_folder import Outcome

pytestmark = pytest.mark.cluster


def start(cluster: Cluster, root: Path) -> subprocess.Popen[str]:
    words = ["--config-dir", str(TESTS / "conf"), "--config-dir", str(TESTS / "cluster/conf"), "job=slurm",
             "job.nproc=1", "job.gpus=0", "job.flags=[--exclusive]", "job.time=1h", "job.grace_s=10",
             f"job.env.PYTHONPATH={PATHS}", "experiment=ledger_toy", f"data.ledger={root}/ledger",
             "optimizer.lr=0.01,0.1", "seed=0,1", "steps=10", "job.max_parallel=2", "sweep.poll_s=0.5", "run=s",
             f"run_root={root}"]  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "launch", "sweep", *words], cwd=root, text=True,
                            env={**cluster.env, "PYTHONPATH": PATHS}, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE)  # fmt: skip


def test_a_sweep_whose_driver_is_killed_goes_on_with_its_jobs_and_each_trial_ends_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = SweepFolder(str(tmp_path / "s"))

    def jobs() -> list[str]:
        """Of all submissions whose job there is; one that was killed before sbatch ran has none."""
        files = (tmp_path / "s/trials").glob("*/submissions/*.handle.json")
        handles = [json.loads(file.read_text())["handle"] for file in files]
        return [handle for handle in handles if handle is not None]

    for begun in (1, 3):
        driver = start(cluster, tmp_path)
        deadline = time.monotonic() + PATIENCE_S
        while len(jobs()) < begun and driver.poll() is None:
            assert time.monotonic() < deadline, driver.communicate()
            time.sleep(0.1)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
    printed, said = start(cluster, tmp_path).communicate(timeout=PATIENCE_S)
    story: Story = folder.story()
    assert [row.last.verdict.value for row in story.trials if row.last] == ["done"] * 4, printed + said
    assert len(jobs()) == 4
    for trial in story.trials:
        run = folder.run(trial.name)
        endings = [run.ending(number) for number in run.attempts()]
        assert [(each.outcome, each.step) for each in endings if each] == [(Outcome.done, 10)]
    assert "4 trials, 40 steps in all" in printed

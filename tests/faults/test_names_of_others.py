"""A folder full of files that are named as Everstep's once were, or as anybody's are, is no obstacle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.outcome import Outcome
from support import TESTS
from support.ranks import folder

pytestmark = pytest.mark.process
FILES = ("trainer.py", "launch/__init__.py", "data/__init__.py", "datasets/__init__.py", "tests/__init__.py",
         "utils.py", "config.py", "conf/__init__.py", "everstep.yaml", "everstep/notes.txt",
         "slurm/run.sbatch")  # fmt: skip
PLUGIN = """
from trainer import width
from everstep import ArrayDataset, Loss, Splits
import numpy as np
from torch import nn


class Task:
    def model(self):
        return nn.Linear(width, 1)

    def loss(self, model, batch):
        return Loss((model(batch["x"])[:, 0] - batch["y"]).square().sum(), len(batch["y"]))

    evaluate = loss


def data():
    x = np.random.default_rng(0).normal(size=(32, width)).astype("float32")
    return Splits(ArrayDataset({"x": x, "y": x.sum(1)}))
"""
EXPERIMENT = """# @package _global_
task: {_target_: mine.Task}
data: {_target_: mine.data}
steps: 4
global_batch: 8
micro_batch: 4
optimizer: {lr: 0.05}
evaluate: {every: null}
"""
WORDS = ("--config-dir", "conf", "experiment=mine", "plugins=[mine]", "run=demo")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in FILES:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise SystemExit('a file of the user was run')\n" if name.endswith(".py") else "")
    (tmp_path / "trainer.py").write_text("width = 3\n")
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "conf/experiment").mkdir()
    (tmp_path / "conf/experiment/mine.yaml").write_text(EXPERIMENT)
    return tmp_path


def run(project: Path, *words: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(project), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *words], cwd=project, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_trains_with_the_users_own_trainer(project: Path) -> None:
    run(project, "-m", "everstep.launch", "run", *WORDS, "job.nproc=2", "parallel=ddp")
    ending = folder(project / "runs", "demo").last_ending()
    assert ending is not None
    assert (ending.outcome, ending.step) == (Outcome.done, 4)


def test_a_bare_torchrun_trains_too(project: Path) -> None:
    run(project, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "everstep.trainer", *WORDS, "parallel=ddp")
    ending = folder(project / "runs", "demo").last_ending()
    assert ending is not None
    assert ending.outcome is Outcome.done


def test_check_finds_nothing_wrong(project: Path) -> None:
    assert "error" not in run(project, "-m", "everstep.launch", "check", *WORDS)


def test_a_sweep_runs_its_trials(project: Path) -> None:
    run(project, "-m", "everstep.launch", "sweep", *WORDS, "optimizer.lr=0.01,0.02", "job.nproc=1")
    trials = [folder(path.parent, path.name) for path in (project / "runs/demo/trials").iterdir()]
    assert [trial.last_ending().outcome for trial in trials] == [Outcome.done] * 2  # type: ignore[union-attr]


def test_a_submission_renders_a_job(project: Path) -> None:
    assert "sbatch" in run(project, "-m", "everstep.launch", "submit", "--dry-run", "job=slurm", *WORDS)

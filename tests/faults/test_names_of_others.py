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
from support.users_project import OWN, lay_out

pytestmark = pytest.mark.process
WORDS = (*OWN, "run=demo")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return lay_out(tmp_path)


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

"""`everstep doctor` of any scheduler: what stands against a job is a line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.launch.__main__ import main
from everstep.launch.schedulers import registry
from support.file_scheduler import VARIABLE, FileScheduler


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileScheduler:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
    return FileScheduler()


def test_what_a_scheduler_says_against_the_job_is_told(
    scheduler: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "job=slurm"]) == 0
    assert capsys.readouterr().out == "ok    slurm        would take the job\n"
    scheduler.keep({**scheduler.known(), "problems": ["job.partition='x': there is no such partition"]})
    assert main(["doctor", "job=slurm", "job.partition=x"]) == 2
    assert capsys.readouterr().out == "fail  slurm        job.partition='x': there is no such partition\n"


def test_a_word_of_an_experiment_needs_the_experiment(scheduler: FileScheduler) -> None:
    assert main(["doctor", "job=slurm", "experiment=digits", "steps=5"]) == 0


@pytest.mark.parametrize(("words", "said"), [
    (["job=slurm", "--out-of-service", "n0"], "only Kubernetes keeps pods of lost nodes; say job=k8s"),
    (["job=slurm", "job.nodez=2"], "job.nodez"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err

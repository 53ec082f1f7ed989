"""The code of a sweep is what it was when the sweep began, for every trial, whenever and by whomever it is started."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from everstep.launch.config import JobConfig
from everstep.launch.schedulers import registry
from everstep.launch.submit.job_spec import JobSpec
from everstep.launch.sweep.plan import Plan, plan, settle
from everstep.launch.sweep.sweep_folder import keep
from everstep.launch.sweep.workers import Task
from everstep.launch.sweep.workers_cluster import ClusterWorkers
from everstep.launch.sweep.workers_local import LocalWorkers
from support.file_scheduler import VARIABLE, FileScheduler


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A sweep that is about to begin, beside a package of the user's."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    project = tmp_path / "project"
    project.mkdir()
    (project / "mine.py").write_text("WORD = 'as it began'")
    monkeypatch.chdir(project)
    words = ["job=slurm", "experiment=digits", "seed=0,1", "plugins=[mine]", "run=s", f"run_root={tmp_path}/runs"]
    return settle(plan(words))


def task(made: Plan, name: str) -> Task:
    return Task(0, made.folder.run(name), made.config({"seed": 0}, name, 0))


def test_a_later_driver_runs_the_code_of_the_first(made: Plan) -> None:
    first = keep(made.folder, ["mine"], JobConfig())
    Path("mine.py").write_text("WORD = 'as edited'")
    later = keep(made.folder, ["mine"], JobConfig())
    assert first is not None
    assert later is not None
    assert later.place == first.place
    assert (later.open() / "mine.py").read_text() == "WORD = 'as it began'"


def test_a_job_of_a_trial_carries_it_in_the_trials_own_folder(made: Plan) -> None:
    code = keep(made.folder, ["mine"], JobConfig())
    assert code is not None
    Path("mine.py").write_text("WORD = 'as edited'")
    trial = task(made, "one")
    ClusterWorkers(made.job, FileScheduler(), code).start([trial])
    assert JobSpec.read(trial.folder).code == code.place
    assert trial.folder.storage.names("code") == [f"{code.place}.tar.gz"]
    assert json.loads(trial.folder.storage.read("provenance.json"))["snapshot"] == code.place


def test_processes_here_import_it_first_and_the_edited_folder_last(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/given")
    code = keep(made.folder, ["mine"], JobConfig())
    assert code is not None
    path = LocalWorkers(made.job, made.any_config, code=code).code
    assert path == {"PYTHONPATH": os.pathsep.join([str(code.open()), "/given", os.getcwd()]), "PYTHONSAFEPATH": "1"}


def test_where_there_is_no_code_the_trials_run_what_they_find(made: Plan) -> None:
    assert keep(made.folder, [], JobConfig()) is None
    trial = task(made, "one")
    ClusterWorkers(made.job, FileScheduler()).start([trial])
    assert JobSpec.read(trial.folder).code is None

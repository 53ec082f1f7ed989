"""The top folder of a run is closed to other users of the machine unless its config says otherwise."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from everstep.config import Access, RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import settle
from everstep.launch.__main__ import main
from everstep.launch.schedulers import registry
from everstep.launch.sweep.plan import plan
from everstep.launch.sweep.plan import settle as settle_sweep
from everstep.run_folder import RunFolder
from everstep.security.access import change_access
from support.file_scheduler import VARIABLE
from support.other_user import UID, as_another, needs_root

MODES = {Access.private: 0o700, Access.group: 0o750, Access.everyone: 0o755}


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o000], autouse=True, ids=oct)
def umask(request: pytest.FixtureRequest) -> object:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o7777


def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "runs" / "r"))


@pytest.mark.parametrize("access", Access)
def test_a_new_run_has_the_mode_that_its_config_says_whatever_the_umask(tmp_path: Path, access: Access) -> None:
    settle(RunConfig(run="r", access=access), run(tmp_path))
    assert mode(tmp_path / "runs" / "r") == MODES[access]


def test_a_resume_changes_the_mode_only_where_the_config_does(tmp_path: Path) -> None:
    settle(RunConfig(run="r"), run(tmp_path))
    (tmp_path / "runs" / "r").chmod(0o711)
    settle(RunConfig(run="r", steps=2000), run(tmp_path))
    assert mode(tmp_path / "runs" / "r") == 0o711
    run(tmp_path).storage.write("attempts/0001/claim.json", b"{}")
    changed = settle(RunConfig(run="r", steps=2000, access=Access.group), run(tmp_path))
    assert [str(change) for change in changed] == ["access: private → group"]
    assert mode(tmp_path / "runs" / "r") == 0o750


def test_a_folder_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r").chmod(0o775)
    settle(RunConfig(run="r"), run(tmp_path))
    assert mode(tmp_path / "runs" / "r") == 0o775


def test_a_group_that_a_project_hands_down_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o2775)
    settle(RunConfig(run="r", access=Access.group), run(tmp_path))
    assert mode(tmp_path / "runs" / "r") == 0o2750


def test_a_sweep_is_closed_as_its_trials_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settle_sweep(plan(["experiment=breast_cancer", "seed=0,1", "run=s"]))
    settle_sweep(plan(["experiment=breast_cancer", "seed=0,1", "run=g", "access=group"]))
    assert (mode(tmp_path / "runs/s"), mode(tmp_path / "runs/g")) == (0o700, 0o750)


def test_the_folder_of_another_program_is_closed_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
    (tmp_path / "x.py").write_text("")
    assert main(["submit", "job=slurm", "run=a", "job.nproc=1", "--", "x.py"]) == 0
    assert main(["submit", "job=slurm", "run=b", "access=everyone", "job.nproc=1", "--", "x.py"]) == 0
    assert (mode(tmp_path / "runs/a"), mode(tmp_path / "runs/b")) == (0o700, 0o755)


@needs_root
def test_5_8_another_user_reads_nothing_of_a_run_but_of_one_that_is_open(open_folder: Path) -> None:
    for name, access in (("a", Access.private), ("g", Access.group), ("e", Access.everyone)):
        folder = RunFolder(str(open_folder / name))
        settle(RunConfig(run=name, access=access), folder)
        (open_folder / name / "config.yaml").chmod(0o644)
    for name in ("a", "g"):
        assert as_another(lambda name=name: os.listdir(open_folder / name)) == "PermissionError"
        assert as_another((open_folder / name / "config.yaml").read_text) == "PermissionError"
    assert "run: e" in as_another((open_folder / "e" / "config.yaml").read_text)
    assert as_another(lambda: shutil.rmtree(open_folder / "e")) == "PermissionError"


@needs_root
def test_only_the_owner_of_a_folder_opens_it(open_folder: Path) -> None:
    folder = RunFolder(str(open_folder / "r"))
    settle(RunConfig(run="r", access=Access.everyone), folder)

    def change() -> str:
        try:
            change_access(folder.storage, Access.group)
        except ConfigError as error:
            return str(error)
        return "changed"

    assert os.getuid() != UID
    assert "only the owner of the folder can" in as_another(change)

"""`everstep check` before torch: every mistake in a line, and the key to change in each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everstep.compose import Composed, compose
from everstep.frozen_config import settle
from everstep.launch.__main__ import main
from everstep.launch.config import JobConfig, job_config
from everstep.launch.preflight.checks import check, program_problems
from everstep.launch.preflight.model import rehearse, worlds
from everstep.launch.schedulers import registry
from support.file_scheduler import VARIABLE, FileScheduler

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(*words: str) -> list[str]:
    composed = compose(["experiment=digits", *words])
    return check(composed, job_config(composed.job))


def listed(*words: str) -> tuple[int, list[str]]:
    """Exit code and lines of the verb without the trainer's part."""
    done = subprocess.run(
        [sys.executable, "-m", "everstep.launch", "check", "--quick", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()


def test_a_run_that_fits_has_no_problem_and_nothing_is_left_behind(tmp_path: Path) -> None:
    assert problems("job.nproc=2") == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_runs_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert problems() == []
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.process
def test_every_mistake_is_told_not_only_the_first() -> None:
    words = ["stepz=3", "paralel=fsdp", "seed=-1", "checkpoint.every=0", "job.nproc=0", "job.grace_s=-1", "job.nprc=2"]
    code, lines = listed("experiment=digits", *words)
    assert code == 2
    assert sorted(line.split(":")[1].strip() for line in lines) == sorted([
        "no key 'stepz'; did you mean 'steps'?", "no key 'paralel'; did you mean 'parallel'?", "seed=-1",
        "checkpoint.every=0", "no key 'job.nprc'; did you mean 'job.nproc'?", "job.nproc=0", "job.grace_s=-1",
    ])  # fmt: skip


@pytest.mark.process
def test_a_command_line_with_nothing_to_train_says_what_is_missing() -> None:
    code, lines = listed("steps=5")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: task=null: nothing to train; give experiment=NAME")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel=single", "job.nproc=2"], "parallel=single on 2 processes"),
        (["parallel=hsdp", "parallel.shard=3", "job.nproc=4"], "parallel.shard=3 does not divide the 4 processes"),
        (["job.nproc=8", "job.gpus=4"], "job.nproc=8: each process needs a GPU, and job.gpus=4; change job.nproc or"),
        (["plugins=[nosuch_package]"], "plugins: there is no package 'nosuch_package' in"),
        (["run_root=/proc/nowhere"], "run_root='/proc/nowhere': cannot write below /proc/nowhere"),
        (["init_from=runs/nothing"], "init_from='runs/nothing': there is neither a checkpoint nor a run"),
        (["data=prepared", "data.path=nowhere"], "data.path='nowhere': there is no dataset"),
    ],
)
def test_what_cannot_work_is_one_line_with_the_key(words: list[str], said: str) -> None:
    (found,) = problems(*words)
    assert said in found
    assert "\n" not in found


@pytest.mark.parametrize("mount", ["/nowhere/data", "/proc"])
def test_what_lies_on_a_claim_is_looked_for_only_where_this_machine_has_it(mount: str) -> None:
    lies = [f"init_from={mount}/run", "data=prepared", f"data.path={mount}/set"]
    composed = compose(["experiment=digits", *lies, "job=k8s", f"job.k8s.claims.d={mount}", "job.image=i"])
    found = check(composed, job_config(composed.job))
    missing = [line for line in found if "there is no dataset" in line or "neither a checkpoint" in line]
    assert len(missing) == (2 if mount == "/proc" else 0)


def test_parts_of_a_mixture_are_looked_for_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.json").write_text("{}")
    found = problems("data=mix", "data.mix=[{path: there, weight: 1}, {path: away, weight: 1}]")
    assert found == [
        "data.mix[1].path='away': there is no dataset; change data.mix[1].path, or make it with 'everstep data prepare'"
    ]


def test_a_run_that_exists_is_held_to_what_may_change() -> None:
    composed = compose(["experiment=digits", "run=r", "seed=1"])
    from everstep.run_folder import RunFolder

    settle(composed.run, RunFolder.of("runs", "r"))
    assert problems("run=r", "seed=1", "steps=900") == []
    (found,) = problems("run=r", "seed=2")
    assert "seed: 1 → 2" in found


def test_packages_beside_the_user_are_found_without_being_imported(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise SystemExit('imported')")
    assert problems("plugins=[mine]") == []


class _Job(JobConfig):
    """A job with keys of clusters."""

    secrets: list[str]
    gpus: int
    node_range: tuple[int, int]


def with_keys(job: JobConfig, **keys: Any) -> JobConfig:
    made = _Job(scheduler="local", nproc=job.nproc)
    for key, value in keys.items():
        object.__setattr__(made, key, value)
    return made


def composed() -> Composed:
    return compose(["experiment=digits"])


def test_secrets_have_to_be_there_and_their_values_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE_TOKEN", "planted-value")
    monkeypatch.delenv("AWAY_TOKEN", raising=False)
    try:
        job = JobConfig(nproc=1, secrets=["HERE_TOKEN", "AWAY_TOKEN"])  # type: ignore[call-arg,unused-ignore]
    except TypeError:
        job = with_keys(JobConfig(nproc=1), secrets=["HERE_TOKEN", "AWAY_TOKEN"])
    found = check(composed(), job)
    assert found == ["job.secrets: AWAY_TOKEN is not set here; export it, or take it out of job.secrets"]


def test_the_cluster_is_asked_and_all_it_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
    FileScheduler().keep({"jobs": {}, "queries": 0, "problems": ["job.time is too long", "job.nodes is too large"]})
    job = JobConfig(nproc=1)
    object.__setattr__(job, "scheduler", "slurm")
    assert check(composed(), job) == ["job.time is too long", "job.nodes is too large"]


def test_the_numbers_of_processes_are_those_of_all_nodes_that_a_start_may_get() -> None:
    digits = composed().run
    assert worlds(digits, JobConfig(nproc=3)) == [3]
    assert worlds(digits, JobConfig(nproc=8, nodes="2:4")) == [16, 24, 32]
    assert worlds(digits, JobConfig(scheduler="slurm", gpus=4, nodes=2)) == [8]
    assert worlds(compose(["experiment=digits", "parallel=single"]).run, JobConfig()) == [1]


def test_where_nobody_says_how_many_a_node_gets_it_is_the_fewest_that_could_be() -> None:
    job = JobConfig(scheduler="slurm", nodes=2)
    assert worlds(composed().run, job) == [2, 2]
    assert worlds(compose(["experiment=digits", "parallel=hsdp", "parallel.shard=8"]).run, job) == [8, 8]


@pytest.mark.process
@pytest.mark.parametrize(("words", "looked_at"), [
    (["parallel=fsdp"], [2, 8]),
    (["parallel=ddp"], [8]),
])  # fmt: skip
def test_the_model_is_built_at_both_ends_where_that_differs(
    words: list[str], looked_at: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert rehearse(compose(["experiment=digits", *words]).run, JobConfig(nproc=2, nodes="1:4"), brief=True) == 0
    said = capfd.readouterr().err
    assert [world for world in (2, 4, 6, 8) if f"on each of {world} processes" in said] == looked_at


def test_a_python_without_torch_says_that_it_has_not_looked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what import takes for a package that is not there
    assert rehearse(compose(["experiment=digits", "model.widht=3"]).run, JobConfig()) == 0
    assert capsys.readouterr().err == (
        f"everstep: {sys.executable} has no torch, so model and data were not looked at here\n"
    )


def test_a_program_has_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    assert program_problems(["train.py", "--any", "--flags"], tmp_path) == []
    assert program_problems(["-m", "json.tool"], tmp_path) == []
    assert program_problems(["-m", "nosuch.tool"], tmp_path) == ["-m nosuch.tool: there is no such module"]
    assert program_problems(["trian.py"], tmp_path) == [f"trian.py: there is no such script in {tmp_path}; change it"]
    assert program_problems([], tmp_path) == ["there is nothing to run after '--'; name a script"]


@pytest.mark.process
def test_without_torch_it_is_quick_and_imports_none() -> None:
    code = (
        "import sys, time; from everstep.launch.__main__ import main; "
        "code = main(['check', '--quick', 'experiment=digits']); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.process
def test_both_parts_are_looked_at_and_the_worse_exit_code_counts(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "experiment=digits", "parallel=fsdp", "job.nproc=2"]) == 0
    shown = capfd.readouterr()
    assert "memory of each of 2 processes (fsdp)" in shown.out
    assert main(["check", "experiment=digits", "init_from=away", "model.widht=3"]) == 2
    shown = capfd.readouterr()
    assert [line.split(":")[1].split("=")[0].strip() for line in shown.err.splitlines()] == ["init_from", "model.widht"]


@pytest.mark.process
def test_a_model_is_built_though_its_data_is_only_where_pods_mount_it(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=digits", "data=prepared", "data.path=/nowhere/data/set"]
    composed = compose(
        [*words, "job=k8s", "job.k8s.claims.d=/nowhere/data", "job.image=i", "job.nproc=1", "job.gpus=0"]
    )
    assert rehearse(composed.run, job_config(composed.job), brief=True) == 0
    shown = capfd.readouterr().err
    assert "/nowhere/data/set: only pods can see the data" in shown
    assert "parameters take" in shown

"""`everstep submit` as far as it needs no cluster: what is refused, and what a dry run shows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.compose import compose
from everstep.errors import ConfigError
from everstep.frozen_config import settle
from everstep.launch.__main__ import main
from everstep.launch.cli.submit import submit
from everstep.launch.schedulers import registry
from everstep.run_folder import RunFolder
from support.file_scheduler import VARIABLE, FileScheduler

JOB = ["job=slurm", "job.nodes=2", "job.nproc=2", "experiment=digits"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_dry_run_shows_script_flags_and_config_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(["--dry-run", *JOB, "run=demo", "job.time=24:00:00"]) == 0
    shown = capsys.readouterr().out
    assert "steps: " in shown
    assert "time: '24:00:00'" in shown
    assert "#SBATCH --requeue" in shown
    assert "--job-name=demo --comment=TOKEN" in shown
    assert f"torchrun … -m everstep.trainer --frozen {tmp_path}/runs/demo" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [
    ["submit", "job=slurm"],
    ["submit", "job=k8s", "job.image=i"],
    ["sweep", "job=slurm", "seed=0,1"],
])  # fmt: skip
def test_a_dry_run_asks_no_store_and_no_cluster(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        store.setblocking(False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.getsockname()[1]}")
        monkeypatch.setenv("KUBECONFIG", "/nowhere")
        monkeypatch.setenv("PATH", "/nowhere")
        keys = ["experiment=digits", "job.nproc=1", "job.gpus=0", "run=demo", "run_root=s3://bucket/runs"]
        assert main([words[0], "--dry-run", *words[1:], *keys]) == 0
        with pytest.raises(BlockingIOError):
            store.accept()
    shown = capsys.readouterr()
    assert "s3://bucket/runs/demo" in shown.out
    assert shown.err == ""


def test_a_dry_run_refuses_changes_of_a_run_that_lies_here(tmp_path: Path) -> None:
    settle(compose(["experiment=digits", "seed=1"]).run, RunFolder.of(str(tmp_path), "demo"))
    with pytest.raises(ConfigError, match="seed: 1 → 2"):
        submit(["--dry-run", *JOB, "run=demo", f"run_root={tmp_path}", "seed=2"])


@pytest.mark.parametrize("scheduler", ["slurm", "k8s"])
def test_what_can_be_seen_to_be_wrong_is_said_beside_a_manifest(
    scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(["--dry-run", f"job={scheduler}", "job.nproc=1", "job.gpus=0", "experiment=digits", "run=demo"]) == 0
    said = capsys.readouterr().err
    assert ("job.image=None: every pod needs an image; change job.image" in said) == (scheduler == "k8s")


def test_another_program_is_shown_with_its_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").touch()
    assert submit(["--dry-run", "job=slurm", "run=mine", "--", "mine.py", "--lr", "1e-3", "--", "x"]) == 0
    shown = capsys.readouterr().out
    assert "torchrun … mine.py --lr 1e-3 -- x" in shown
    assert "config.yaml" not in shown


@pytest.mark.parametrize(("words", "said"), [
    (["job=slurm", "experiment=digits", "job.node=2"], "no key 'job.node'; did you mean 'job.nodes'?"),
    (["job=slurm", "experiment=digits", "job.time=90"], "job.time='90': write 24h, 90m"),
    (["job=slurm", "experiment=digits", "job.nodes=4:2"], "job.nodes='4:2'"),
    (["job=slurm", "experiment=digitz"], "there is no such experiment; did you mean 'digits'?"),
    (["job=slurm", "experiment=digits", "parallel=single", "job.nodes=2", "job.nproc=1"], "parallel=single on 2"),
    (["experiment=digits"], "job=local starts here and now: write everstep run"),
    (["job=slurm", "experiment=digits", "job.secrets=[NOT_EXPORTED]"], "job.secrets names NOT_EXPORTED"),
    (["job=slurm", "--"], "nothing stands after --"),
    (["job=slurm", "--", "absent.py"], "absent.py: there is no such script in "),
    (["job=slurm", "steps=5", "--", "absent.py"], "'steps=5' is for our trainer"),
])  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line_and_nothing_is_written(
    words: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        submit(words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileScheduler:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
    return FileScheduler()


UNFIT = [*JOB, "run=demo", "job.gpus=0", "model.widht=3"]


@pytest.mark.process
def test_a_model_that_cannot_be_built_is_not_submitted(
    scheduler: FileScheduler, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(UNFIT) == 2
    assert capfd.readouterr().err.startswith("error: model.widht: ")
    assert not (tmp_path / "runs").exists()
    assert scheduler.known()["jobs"] == {}


def test_where_there_is_no_torch_it_is_submitted_with_a_word_on_that(
    scheduler: FileScheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what import takes for a package that is not there
    assert submit(UNFIT) == 0
    assert capsys.readouterr().err == (
        f"everstep: {sys.executable} has no torch, so model and data were not looked at here\n"
    )
    assert len(scheduler.known()["jobs"]) == 1


def test_quick_looks_at_no_model_and_a_job_that_is_there_is_not_looked_at_again(
    scheduler: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(["--quick", *UNFIT]) == 0
    assert submit(UNFIT) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[1].endswith("already submitted as slurm://file/1 (pending)")


def test_elastic_jobs_are_checked_at_every_number_of_nodes() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.shard=4 does not divide the 6 processes"):
        submit(["--dry-run", "job=slurm", "experiment=digits", "parallel=hsdp", "parallel.shard=4", "job.nodes=2:4",
                "job.nproc=2"])  # fmt: skip


@pytest.mark.process
def test_submitting_imports_no_torch(tmp_path: Path) -> None:
    code = ("import sys; from everstep.launch.__main__ import main; main(sys.argv[1:]); "
            "heavy = {'torch', 'wandb', 'pyarrow', 'numpy'} & set(sys.modules); assert not heavy, heavy")  # fmt: skip
    words = ["submit", "--dry-run", *JOB, "run=demo"]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code, *words], env={**os.environ, "PYTHONPATH": str(root)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr

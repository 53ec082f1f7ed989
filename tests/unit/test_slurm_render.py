"""The sbatch command of a job, and Slurm's answers that need no cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from everstep.errors import ConfigError
from everstep.launch.config import job_config
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.slurm.sbatch import script
from everstep.launch.schedulers.slurm.scheduler import Slurm

PROGRAM = Program("demo", "/runs/demo", ("-m", "everstep.trainer", "--frozen", "/runs/demo"), "everstep-1")


def argv(**keys: object) -> list[str]:
    return list(Slurm().render(job_config({"scheduler": "slurm", "python": "/venv/bin/python", **keys}), PROGRAM).argv)


def test_the_whole_command() -> None:
    job = {
        "nodes": 4, "nproc": 8, "time": "1d12h", "partition": "gpu", "account": "lab", "qos": "high", "cpus": 96,
        "constraint": "h100&ib", "exclude": ["n7", "n9"], "mem": "0", "grace_s": 120, "flags": ["--exclusive"],
        "setup": ["module load cuda/12.4"],
    }  # fmt: skip
    spec_of = job_config({"scheduler": "slurm", "python": "/venv/bin/python", **job})
    assert argv(**job) == [
        "sbatch", "--parsable", "--job-name=demo", "--comment=everstep-1", "--output=/runs/demo/slurm-%j.out",
        "--nodes=4", "--time=2160", "--partition=gpu", "--account=lab", "--qos=high", "--constraint=h100&ib",
        "--exclude=n7,n9",
        "--gpus-per-node=8", "--cpus-per-task=96", "--mem=0", "--signal=B:USR1@150",
        "--exclusive", str(script()), "/runs/demo", "--spec", PROGRAM.spec(spec_of),
        "--python", "/venv/bin/python", "--setup", "module load cuda/12.4",
    ]  # fmt: skip


def test_what_is_not_asked_for_is_left_to_the_site() -> None:
    given = argv()
    assert "--nodes=1" in given
    assert not [word for word in given if word.startswith(("--time", "--partition", "--gpus", "--mem", "--cpus"))]


@pytest.mark.parametrize(("gpus", "nproc", "flag"), [
    ("auto", 8, ["--gpus-per-node=8"]), ("auto", "auto", []), (0, 8, []), (4, 8, ["--gpus-per-node=4"]),
])  # fmt: skip
def test_gpus_follow_the_processes(gpus: int | str, nproc: int | str, flag: list[str]) -> None:
    assert [word for word in argv(gpus=gpus, nproc=nproc) if "gpus" in word] == flag


def test_a_range_of_nodes_is_slurms_range() -> None:
    assert "--nodes=2-4" in argv(nodes="2:4")


def test_containers_are_reached_through_srun_or_run_within_it() -> None:
    pyxis = argv(image="registry#team/train:1", mounts=["/data:/data"])
    flags = [pyxis[i + 1] for i, word in enumerate(pyxis) if word == "--srun"]
    assert flags[0] == "--container-image=registry#team/train:1"
    assert "/data:/data," in flags[1]
    assert "/runs/demo:/runs/demo" in flags[1]
    apptainer = argv(image="/images/train.sif", runtime="apptainer", gpus=0)
    words = [apptainer[i + 1] for i, word in enumerate(apptainer) if word == "--within"]
    assert (words[:2], words[-1], "--nv" in words) == (["apptainer", "exec"], "/images/train.sif", False)


def test_the_value_of_a_secret_is_in_no_part_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    rendered = Slurm().render(job_config({"scheduler": "slurm", "secrets": ["WANDB_API_KEY"]}), PROGRAM)
    assert "s3cret-value" not in " ".join([*rendered.argv, *rendered.files.values()])


def test_the_same_job_gives_the_same_text() -> None:
    job = job_config({"scheduler": "slurm"})
    assert Slurm().render(job, PROGRAM) == Slurm().render(job, PROGRAM)


def test_the_script_is_sound_bash_and_expands_nothing_into_its_own_text() -> None:
    assert subprocess.run(["bash", "-n", str(script())], check=False).returncode == 0
    assert "{{" not in script().read_text()


def fake(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = folder / name
    command.write_text(f"#!/bin/sh\n{text}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_controller_that_comes_back_is_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    fake(tmp_path, "squeue", f"""n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) >{tmp_path}/n
[ $n -ge 1 ] || {{ echo '{away}' >&2; exit 1; }}; echo '{{"jobs": []}}'""", monkeypatch)  # fmt: skip
    assert Slurm(retry_s=20).find("token") is None


def test_a_controller_that_stays_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "squeue", "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", monkeypatch)
    with pytest.raises(ConfigError, match="squeue does not answer: Unable to contact slurm controller"):
        Slurm(retry_s=0.1).find("token")


def test_a_machine_without_slurm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no squeue here; submit on a login node"):
        Slurm().find("token")

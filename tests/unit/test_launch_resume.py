"""`everstep resume`: what the folder says, with what may change, here or through a scheduler."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import start_digest, thaw
from everstep.launch import torchrun
from everstep.launch.__main__ import main
from everstep.launch.schedulers import registry
from everstep.launch.schedulers.job import JobHandle
from everstep.launch.submit.override_frozen import amend
from everstep.launch.submit.trust import Runnable, sign
from support.file_scheduler import VARIABLE, FileScheduler
from support.run_records import Records

FAKE = """
import sys
from everstep.run_folder import RunFolder
from everstep.outcome import Ending, Outcome
folder = RunFolder(sys.argv[1])
folder.end(folder.claim({}), Ending(Outcome.done, step=int(sys.argv[2])))
"""


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """A run that was started here, and stopped."""
    monkeypatch.chdir(tmp_path)
    records = Records(str(tmp_path / "runs" / "demo"), steps=50)
    records.folder.storage.write(
        "job.yaml", yaml.safe_dump({"scheduler": "local", "nproc": 1, "threads": 1, "warm": False}).encode()
    )
    records.attempt(1, 0)
    records.end(1, 100, "preempted", 20)
    return records


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each start of the trainer; it ends at once, done at the last step."""
    calls: list[tuple[Any, ...]] = []

    def command(url: str, nproc: int, grace_s: int, plugins: list[str], digest: str) -> list[str]:
        calls.append((nproc, grace_s, plugins))
        return [sys.executable, "-c", FAKE, url, "1000"]

    monkeypatch.setattr(torchrun, "command", command)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    return calls


def config(records: Records) -> RunConfig:
    return thaw(records.folder.storage.read("config.yaml").decode())


@pytest.mark.process
def test_a_run_goes_on_as_it_was_started(stopped: Records, started: list[tuple[Any, ...]]) -> None:
    assert main(["resume", "demo"]) == 0
    assert (started, stopped.folder.attempts()) == ([(1, 60, [])], [1, 2])


@pytest.mark.process
def test_what_may_change_changes(
    stopped: Records, started: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", "demo", "steps=80", "parallel=fsdp", "checkpoint.every=7", "job.grace_s=5"]) == 0
    changed = config(stopped)
    assert (changed.steps, changed.parallel.kind.value, changed.checkpoint.every) == (80, "fsdp", 7)
    assert yaml.safe_load(stopped.folder.storage.read("job.yaml"))["grace_s"] == 5
    assert started[0][1] == 5
    assert "changed since the last start: steps: 50 → 80" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [("seed=3", "seed: 0 → 3"), ("stepz=3", "no key 'stepz'; did you mean 'steps'?"),
     ("max_steps=3", "no key 'max_steps'; did you mean 'steps'?"), ("steps=-3", "steps=-3"),
     ("experiment=digits", "experiment=digits: a run that goes on keeps its experiment"),
     ("parallel=fdsp", "did you mean 'fsdp'?"), ("steps=1,2", "only 'everstep sweep' takes them"),
     ("steps", "cannot read 'steps'"), ("job.nprc=2", "did you mean 'job.nproc'?"), ("steps=many", "steps")],
)  # fmt: skip
def test_a_mistake_changes_nothing(
    stopped: Records, started: list[tuple[Any, ...]], word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stopped.folder.storage.read("config.yaml")
    assert main(["resume", "demo", word]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert (started, stopped.folder.storage.read("config.yaml")) == ([], before)


def test_a_run_that_is_done_says_so(stopped: Records, capsys: pytest.CaptureFixture[str]) -> None:
    stopped.attempt(2, 200)
    stopped.end(2, 300, "done", 50)
    assert main(["resume", "demo"]) == 0
    assert "is done: step 50 of 50; give a larger steps= to go on" in capsys.readouterr().err
    assert stopped.folder.attempts() == [1, 2]


def test_a_run_that_is_under_way_is_not_started_beside_itself(
    stopped: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped.attempt(2, 999, host=socket.gethostname(), pid=os.getpid())
    assert main(["resume", "demo"]) == 2
    assert "run demo is starting already; 'everstep cancel' stops it" in capsys.readouterr().err


@pytest.mark.process
def test_packages_in_a_folder_of_another_user_are_named_again(
    tmp_path: Path, started: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Records(str(tmp_path / "runs" / "mine"), plugins=["mine"])
    assert main(["resume", "mine"]) == 2
    assert "would run plugins=[mine], and nothing shows that you wrote this" in capsys.readouterr().err
    assert started == []
    assert main(["resume", "mine", "plugins=[mine]", "job.nproc=1", "job.warm=false"]) == 0
    assert started == [(1, 60, ["mine"])]


@pytest.fixture(autouse=True)
def cluster_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs go to a scheduler that keeps them in a file."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))


def submitted() -> list[list[str]]:
    """What the cluster was given, beside the job that was there."""
    return [job["argv"] for job in FileScheduler().known()["jobs"].values() if "argv" in job]


def as_job(records: Records) -> None:
    """A job of this user's, whose code is the user's own too."""
    sign(records.folder.storage, Runnable(code="the code of the first submission"))
    records.folder.storage.write("job.yaml", yaml.safe_dump({"scheduler": "slurm", "nproc": 2}).encode())
    records.submit(1, 0, JobHandle("slurm", "file", "0"))


def test_a_job_is_submitted_again(stopped: Records, capsys: pytest.CaptureFixture[str]) -> None:
    as_job(stopped)
    FileScheduler().set("0", state="succeeded")
    assert main(["resume", "demo", "--quick", "steps=60", "job.nproc=4"]) == 0
    ((*argv, option, value),) = submitted()
    assert argv == ["-m", "everstep.trainer", "--frozen", stopped.folder.storage.url]
    assert (option, value) == ("--config-digest", start_digest(config(stopped)))
    assert yaml.safe_load(stopped.folder.storage.read("job.yaml"))["nproc"] == 4
    intent = json.loads(stopped.folder.storage.read("submissions/0002.json"))
    assert intent["code"] == "the code of the first submission"
    assert config(stopped).steps == 60
    assert capsys.readouterr().out == "demo in runs/demo: slurm://file/2\n"


@pytest.mark.process
def test_what_changes_is_built_before_with_the_code_that_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from everstep.trainer.tasks.classification import ImageClassifier\nclass Mine(ImageClassifier):\n    pass\n"
    )
    words = ["job=slurm", "job.nproc=1", "job.gpus=0", "experiment=digits", "task._target_=mine.Mine", "plugins=[mine]"]
    assert main(["submit", *words, "run=mine"]) == 0
    mine.write_text("raise RuntimeError('edited since')")
    FileScheduler().set("1", state="failed")
    capfd.readouterr()
    assert main(["resume", "mine", "plugins=[mine]", "job.nproc=2", "parallel=ddp"]) == 0
    assert "parameters take" in capfd.readouterr().err
    FileScheduler().set("2", state="failed")
    assert main(["resume", "mine", "plugins=[mine]", "resume.allow=[model]", "model.widht=3"]) == 2
    assert "error: model.widht: " in capfd.readouterr().err
    assert len(submitted()) == 2
    assert "widht" not in (tmp_path / "runs/mine/config.yaml").read_text()


def test_what_the_cluster_would_refuse_is_not_submitted(stopped: Records, capsys: pytest.CaptureFixture[str]) -> None:
    as_job(stopped)
    FileScheduler().keep({"jobs": {}, "queries": 0, "problems": ["job.time is too long", "job.nodes is too large"]})
    assert main(["resume", "demo"]) == 2
    assert capsys.readouterr().err == "everstep: job.time is too long\neverstep: job.nodes is too large\n"
    assert submitted() == []


def test_a_job_that_waits_is_not_submitted_twice(stopped: Records, capsys: pytest.CaptureFixture[str]) -> None:
    as_job(stopped)
    FileScheduler().set("0", state="pending")
    assert main(["resume", "demo"]) == 2
    assert "run demo is queued already" in capsys.readouterr().err
    assert submitted() == []


def test_a_launcher_that_died_between_intent_and_job_leaves_the_question_to_submit(stopped: Records) -> None:
    as_job(stopped)
    stopped.submit(2, 500, None)
    assert main(["resume", "demo"]) == 0
    assert len(submitted()) == 1


@pytest.mark.process
def test_a_job_may_go_on_here(stopped: Records, started: list[tuple[Any, ...]]) -> None:
    as_job(stopped)
    FileScheduler().set("0", state="failed")
    assert main(["resume", "demo", "job=local", "job.nproc=1", "job.warm=false"]) == 0
    assert (submitted(), started) == ([], [(1, 60, [])])


def test_a_choice_replaces_its_group_and_a_key_only_itself() -> None:
    frozen = RunConfig(run="r")
    frozen.checkpoint.keep_last = 9
    kept, _ = amend(frozen, {}, ["checkpoint.every=3"])
    replaced, _ = amend(frozen, {}, ["checkpoint=often"])
    assert (kept.checkpoint.keep_last, replaced.checkpoint.keep_last) == (9, 2)


def test_a_null_and_a_list_are_read_as_hydra_reads_them() -> None:
    changed, job = amend(RunConfig(run="r", ema=0.5), {"nproc": 1}, ["ema=null", "resume.allow=[ema]", "job.nproc=2"])
    assert (changed.ema, changed.resume.allow, job) == (None, ["ema"], {"nproc": 2})
    with pytest.raises(ConfigError, match="cannot read"):
        amend(RunConfig(), {}, ["a=[1"])

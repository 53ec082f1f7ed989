"""`everstep run` from the command line to the exit code, with a trainer of a few lines in place of the real one."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep.config import RunConfig
from everstep.errors import ConfigError, StorageError
from everstep.frozen_config import settle, thaw
from everstep.launch import torchrun
from everstep.launch.__main__ import main
from everstep.launch.cli.run import run as launch_run
from everstep.outcome import Ending, Outcome
from everstep.run_folder import RunFolder
from support.processes import alive, until

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
from everstep.run_folder import STOP_MARKER, RunFolder
from everstep.outcome import Ending, Outcome
folder = RunFolder(sys.argv[1])
plan = json.loads(Path(os.environ["PLAN"]).read_text())
done = len(folder.attempts())
act = plan[min(done, len(plan) - 1)]
if act.get("exit_before_claim") is not None:
    sys.exit(act["exit_before_claim"])
if act.get("other_starts"):
    folder.claim({})
    os.environ["EVERSTEP_STARTER"] = "somebody else"
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
attempt = folder.claim({})
if "commit" in act:
    folder.storage.write(folder.checkpoint(act["commit"], attempt) + "/manifest.json", b"{}")
while act.get("until_stopped") and not (stop and folder.storage.exists(STOP_MARKER)):
    time.sleep(0.01)
if act.get("other_starts"):
    sys.exit(1)
if act.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
ending = Ending(Outcome(act["outcome"]), step=act.get("step", 0), micro_batch=act.get("micro_batch"))
folder.end(attempt, ending)
sys.exit(1 if act.get("flat") else ending.outcome.exit_code)
"""

DRIVER = """
import sys
from everstep.launch import torchrun
from everstep.launch.__main__ import main
torchrun.command = lambda url, *_: [sys.executable, sys.argv[1], url]
sys.exit(main(sys.argv[2:]))
"""


class Bench:
    """A project folder with one experiment, and a plan of what each attempt of the fake trainer does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "runs"
        experiment = folder / "conf" / "experiment" / "tiny.yaml"
        experiment.parent.mkdir(parents=True)
        experiment.write_text(
            "# @package _global_\ntask: {_target_: everstep.tasks.Tiny}\ndata: {_target_: everstep.data.Tiny}\n"
        )
        (folder / "fake.py").write_text(FAKE)

    def plan(self, *acts: dict[str, Any]) -> None:
        (self.folder / "plan.json").write_text(json.dumps(acts))

    def words(self, *more: str) -> list[str]:
        fixed = ["--config-dir", str(self.folder / "conf"), "experiment=tiny", f"run_root={self.root}", "run=r"]
        return ["run", *fixed, "job.nproc=1", "job.warm=false", *more]

    def run(self, *more: str) -> int:
        return main(self.words(*more))

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder.of(str(self.root), "r")

    def decisions(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted((self.root / "r" / "restarts").iterdir())]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    monkeypatch.setattr(torchrun, "command", lambda url, *_: [sys.executable, str(tmp_path / "fake.py"), url])
    monkeypatch.setattr("everstep.launch.restart.supervisor.back_off_s", lambda _: 0.0)
    monkeypatch.setenv("PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.process
def test_a_run_leaves_config_job_and_provenance_in_its_folder(bench: Bench) -> None:
    bench.plan({"outcome": "done", "step": 5})
    assert bench.run("steps=5", "job.env.A=1") == 0
    config = thaw(bench.run_folder.storage.read("config.yaml").decode())
    job = yaml.safe_load(bench.run_folder.storage.read("job.yaml"))
    provenance = json.loads(bench.run_folder.storage.read("provenance.json"))
    assert (config.steps, config.run) == (5, "r")
    assert (job["nproc"], job["env"]) == (1, {"A": "1"})
    assert provenance["packages"]["omegaconf"]


@pytest.mark.process
def test_a_run_that_is_done_is_not_started_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.plan({"outcome": "done", "step": 5})
    assert [bench.run("steps=5"), bench.run("steps=5")] == [0, 0]
    assert bench.run_folder.attempts() == [1]
    assert "run r is done: step 5 of 5" in capsys.readouterr().err


@pytest.mark.process
def test_more_steps_go_on_where_the_run_was_done(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.plan({"outcome": "done", "step": 5}, {"outcome": "done", "step": 9})
    assert [bench.run("steps=5"), bench.run("steps=9")] == [0, 0]
    assert bench.run_folder.attempts() == [1, 2]
    assert "changed since the last start: steps: 5 → 9" in capsys.readouterr().err


@pytest.mark.process
def test_a_changed_seed_is_refused_and_the_folder_stays_as_it_was(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.plan({"outcome": "preempted", "step": 2})
    assert bench.run("seed=1") == 75
    assert bench.run("seed=2") == 2
    assert "seed: 1 → 2" in capsys.readouterr().err
    assert thaw(bench.run_folder.storage.read("config.yaml").decode()).seed == 1
    assert bench.run_folder.attempts() == [1]


@pytest.mark.process
@pytest.mark.parametrize("outcome", ["done", "config_error", "diverged", "superseded", "preempted"])
def test_the_exit_code_is_the_outcomes_though_torchrun_flattens_it(bench: Bench, outcome: str) -> None:
    bench.plan({"outcome": outcome, "flat": True})
    codes = {"done": 0, "config_error": 2, "diverged": 3, "superseded": 4, "preempted": 75}
    assert bench.run() == codes[outcome]
    assert bench.run_folder.attempts() == [1]


@pytest.mark.process
def test_crashes_and_kills_start_again_until_done(bench: Bench) -> None:
    bench.plan({"outcome": "crashed"}, {"kill": True}, {"outcome": "done", "step": 1000})
    assert bench.run() == 0
    assert bench.run_folder.attempts() == [1, 2, 3]
    assert [d["outcome"] for d in bench.decisions()] == ["crashed", None, "done"]
    assert [d["go_on"] for d in bench.decisions()] == [True, True, False]


@pytest.mark.process
def test_no_progress_uses_the_budget_up_and_progress_refills_it(bench: Bench) -> None:
    stuck = {"kill": True}
    bench.plan(stuck, stuck, {"kill": True, "commit": 10}, stuck, stuck, stuck)
    assert bench.run("job.max_restarts=2") == 1
    assert [d["restarts"] for d in bench.decisions()] == [1, 2, 1, 2, 2]


@pytest.mark.process
def test_a_checkpoint_without_manifest_is_no_progress(bench: Bench) -> None:
    bench.plan({"kill": True})
    torn = bench.root / "r" / "checkpoints" / "step-00000010-attempt-0001" / "data"
    torn.parent.mkdir(parents=True)
    torn.write_text("half")
    assert bench.run_folder.newest_step() is None
    assert bench.run("job.max_restarts=1") == 1
    assert bench.run_folder.attempts() == [1, 2]


@pytest.mark.process
def test_a_microbatch_that_does_not_shrink_ends_the_run(bench: Bench) -> None:
    sizes: list[dict[str, Any]] = [{"outcome": "out_of_memory", "micro_batch": size} for size in (16, 8, 8)]
    bench.plan(*sizes)
    assert bench.run("job.max_restarts=0") == 1
    assert [d["go_on"] for d in bench.decisions()] == [True, True, False]


@pytest.mark.process
@pytest.mark.parametrize("code", [2, 75])
def test_an_exit_code_counts_where_no_attempt_was_claimed(bench: Bench, code: int) -> None:
    bench.plan({"exit_before_claim": code})
    assert bench.run() == code
    assert len(bench.decisions()) == 1


@pytest.mark.process
def test_a_run_that_somebody_else_has_taken_over_is_not_taken_back(bench: Bench) -> None:
    bench.plan({"other_starts": True})
    assert bench.run() == 4
    assert bench.run_folder.attempts() == [1, 2]
    assert bench.decisions()[0]["outcome"] == "superseded"


@pytest.mark.process
def test_the_marker_of_an_earlier_stop_does_not_stop_this_start(bench: Bench) -> None:
    bench.plan({"outcome": "done", "step": 1000})
    bench.run_folder.storage.write("stop", b"SIGTERM")
    assert bench.run() == 0
    assert not bench.run_folder.storage.exists("stop")


def _start_in_background(bench: Bench) -> subprocess.Popen[str]:
    driven = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(bench.folder / "fake.py"), *bench.words()],
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: bench.run_folder.storage.exists("attempts/0001/claim.json"))
    return driven


@pytest.mark.process
def test_ctrl_c_saves_stops_and_is_not_followed_by_a_restart(bench: Bench) -> None:
    bench.plan({"outcome": "preempted", "step": 3, "until_stopped": True})
    driven = _start_in_background(bench)
    driven.send_signal(signal.SIGINT)
    _, said = driven.communicate(timeout=20)
    assert driven.returncode == 75
    assert "Traceback" not in said
    assert "stopped and saved; the same command goes on from there (step 3)" in said
    assert not bench.run_folder.storage.exists("stop")
    assert bench.run_folder.attempts() == [1]


@pytest.mark.process
@pytest.mark.parametrize(("act", "code"), [({"outcome": "crashed"}, 1), ({"kill": True}, 75)])
def test_a_stop_that_does_not_save_is_not_called_saved(bench: Bench, act: dict[str, Any], code: int) -> None:
    bench.plan({**act, "until_stopped": True})
    driven = _start_in_background(bench)
    driven.send_signal(signal.SIGTERM)
    _, said = driven.communicate(timeout=20)
    assert driven.returncode == code
    assert "not started again (SIGTERM), the last checkpoint stands" in said
    assert bench.run_folder.attempts() == [1]


@pytest.mark.process
def test_kill_9_of_everstep_leaves_no_trainer(bench: Bench) -> None:
    bench.plan({"outcome": "preempted", "until_stopped": True})
    driven = _start_in_background(bench)
    trainer = json.loads(bench.run_folder.storage.read("attempts/0001/claim.json"))["pid"]
    driven.kill()
    driven.communicate(timeout=20)
    until(lambda: not alive(trainer))


def test_cfg_shows_run_and_job_and_writes_nothing(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run("--cfg", "optimizer.lr=0.5", "job.grace_s=9") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optimizer"]["lr"] == 0.5
    assert shown["job"]["grace_s"] == 9
    assert not bench.root.exists()


def test_a_wrong_job_key_is_refused_before_anything_is_written(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run("job.max_restart=1") == 2
    assert "did you mean 'job.max_restarts'?" in capsys.readouterr().err
    assert not bench.root.exists()


@pytest.mark.process
def test_a_run_without_a_name_gets_one_from_the_experiment_and_the_time(bench: Bench) -> None:
    bench.plan({"outcome": "done", "step": 1000})
    assert main([word for word in bench.words() if word != "run=r"]) == 0
    (name,) = [entry.name for entry in bench.root.iterdir()]
    assert name.startswith("tiny-2")


def test_a_config_that_never_came_to_a_step_does_not_hold_its_name(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r")
    settle(RunConfig(run="r", seed=1), folder)
    folder.end(folder.claim({}), Ending(Outcome.config_error))
    assert [str(change) for change in settle(RunConfig(run="r", seed=2), folder)] == ["seed: 1 → 2"]
    assert thaw(folder.storage.read("config.yaml").decode()).seed == 2
    folder.end(folder.claim({}), Ending(Outcome.crashed, 1))
    with pytest.raises(ConfigError, match="was started with another config"):
        settle(RunConfig(run="r", seed=1), folder)


def test_settle_holds_the_second_of_two_starters_to_the_config_of_the_first(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "r")
    assert settle(RunConfig(run="r", seed=1), folder) == []
    assert settle(RunConfig(run="r", seed=1), folder) == []
    with pytest.raises(ConfigError, match=r"seed: 1 → 2.*resume\.allow=\[seed\]"):
        settle(RunConfig(run="r", seed=2), folder)
    assert [str(change) for change in settle(RunConfig(run="r", seed=1, steps=7), folder)] == ["steps: 1000 → 7"]


@pytest.mark.parametrize("text", ["a: [", "- 1", "steps: many", "stepz: 1"])
def test_a_damaged_config_in_the_folder_is_said_in_one_line(tmp_path: Path, text: str) -> None:
    folder = RunFolder.of(str(tmp_path), "r")
    folder.storage.write("config.yaml", text.encode())
    with pytest.raises(ConfigError, match=r"config\.yaml of the run folder") as error:
        settle(RunConfig(run="r"), folder)
    assert "\n" not in str(error.value)


def test_a_run_root_in_an_object_store_works_like_a_local_one(tmp_path: Path) -> None:
    folder = RunFolder.of("memory://bucket/runs", tmp_path.name)
    settle(RunConfig(run="r"), folder)
    folder.record_restart({"reason": "a"})
    folder.record_restart({"reason": "b"})
    folder.storage.write(f"{folder.checkpoint(30, 1)}/manifest.json", b"{}")
    assert folder.storage.names("restarts") == ["0001.json", "0002.json"]
    assert folder.newest_step() == 30


def test_a_start_names_the_folder_by_its_full_url(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []

    def command(url: str, *_: object) -> list[str]:
        named.append(url)
        return ["false"]

    monkeypatch.setattr(torchrun, "command", command)
    bench.plan({})
    bench.run("run_root=elsewhere", "job.max_restarts=0")
    assert named == [str(bench.folder / "elsewhere" / "r")]


@pytest.mark.parametrize(("words", "said"), [
    (["job=slurm"], "job=slurm is a cluster: write everstep submit"),
    (["job.nodes=2"], "job.nodes=2: job=local is this one machine"),
])  # fmt: skip
def test_a_job_of_a_cluster_is_not_started_here(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        launch_run(["experiment=digits", f"run_root={tmp_path}", *words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
@pytest.mark.parametrize(
    "plan", [[{"outcome": "done", "step": 1000}], [{"kill": True}, {"outcome": "done", "step": 1000}]]
)
def test_decisions_that_cannot_be_written_cost_the_run_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, plan: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("everstep.launch.restart.supervisor.AGAIN_S", 0.01)
    monkeypatch.setattr("everstep.launch.restart.supervisor.LAST_PAUSE_S", 0.0)
    record, tries = RunFolder.record_restart, iter(range(3))

    def full(self: RunFolder, facts: dict[str, Any]) -> None:
        if next(tries, None) is not None:
            raise StorageError("cannot write restarts/0001.json: No space left on device")
        record(self, facts)

    monkeypatch.setattr(RunFolder, "record_restart", full)
    bench.plan(*plan)
    assert bench.run() == 0
    assert [d["go_on"] for d in bench.decisions()] == [act.get("kill", False) for act in plan]
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.process
def test_a_folder_that_never_takes_the_last_decision_leaves_the_exit_code_of_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr("everstep.launch.restart.supervisor.LAST_PAUSE_S", 0.0)
    monkeypatch.setattr(RunFolder, "record_restart", full)
    bench.plan({"outcome": "done", "step": 1000})
    assert bench.run() == 0


@pytest.mark.process
def test_a_signal_before_anything_is_started_is_told(bench: Bench) -> None:
    script = (
        "import os, signal, sys\n"
        "import everstep.launch.cli.run\n"
        "everstep.launch.cli.run.compose = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "from everstep.launch.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    heard = functools.partial(signal.signal, signal.SIGUSR1, signal.SIG_DFL)
    done = subprocess.run(
        [sys.executable, "-c", script, *bench.words()], capture_output=True, text=True, preexec_fn=heard
    )
    assert done.returncode == 75
    assert done.stderr == "everstep: SIGUSR1: nothing has been started; the same command begins again\n"

"""Finding a fault as a user does: the debug group, pdb, runs that are going already, and trackers after kills."""

from __future__ import annotations

import gzip
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from everstep.run_folder import RunFolder
from support.processes import until

pytestmark = pytest.mark.process
PLUGIN = """
import os
import time
import numpy as np
import torch
from everstep import ArrayDataset, Loss, Splits
from torch import nn

class Root(nn.Module):
    def forward(self, x):
        return torch.sqrt(x * 0)

class Bad(nn.Module):
    def forward(self, x):
        return torch.log(-x * x - 1)

class Task:
    def __init__(self, fault=""):
        self.fault, self.calls = fault, 0
    def model(self):
        middle = {"root": Root, "bad": Bad}.get(self.fault, nn.Identity)
        return nn.Sequential(nn.Linear(3, 4), middle(), nn.Linear(4, 1))
    def loss(self, model, batch):
        self.calls += 1
        if self.calls == 9 and self.fault == "raise":
            raise ValueError("boom")
        if self.calls == 9 and self.fault == "break":
            breakpoint()
        if self.fault == "slow":
            time.sleep(0.02)
        scale = 1 + time.time_ns() % 1000 / 1e4 if self.fault == "clock" else 1.0
        return Loss((model(batch["x"] * scale)[:, 0] - batch["y"]).square().sum(), len(batch["y"]))
    def evaluate(self, model, batch):
        return Loss((model(batch["x"])[:, 0] - batch["y"]).square().sum(), len(batch["y"]))

def data():
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    return Splits(ArrayDataset({"x": x, "y": x.sum(1)}), ArrayDataset({"x": x[:9], "y": x[:9].sum(1)}))
"""
EXPERIMENT = """# @package _global_
task: {_target_: mine.Task}
data: {_target_: mine.data}
steps: 20
global_batch: 8
micro_batch: 4
optimizer: {lr: 0.05}
evaluate: {every: null}
stop: {poll_s: 0.2}
log: {progress: lines}
"""
WORDS = ("--config-dir", "conf", "experiment=mine", "plugins=[mine]", "run=a")
EVERSTEP = (sys.executable, "-m", "everstep.launch")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(EXPERIMENT)
    (tmp_path / "mine.py").write_text(PLUGIN)
    return tmp_path


def environment() -> dict[str, str]:
    hidden = ("MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_MODE")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def everstep(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EVERSTEP, *words], cwd=project, env=environment(), capture_output=True, text=True, timeout=200
    )


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return everstep(project, "run", *WORDS, "job.nproc=1", *words)


def test_one_step_has_evaluated_and_saved_and_asks_no_tracker(project: Path) -> None:
    done = run(project, "debug=one_step", "log.wandb.project=x")
    assert done.returncode == 0, done.stderr
    folder = RunFolder(str(project / "runs/a"))
    assert folder.newest_step() == 1
    kinds = [record["kind"] for record in folder.lines(1, "metrics.jsonl")]
    assert kinds == ["train", "evaluate"]


@pytest.mark.parametrize(("lr", "code"), [("0.05", 0), ("1e-12", 3)])
def test_a_loss_that_does_not_fall_on_two_batches_ends_as_diverged(project: Path, lr: str, code: int) -> None:
    done = run(project, "debug=overfit", f"optimizer.lr={lr}")
    assert done.returncode == code, done.stderr
    assert ("debug.overfit=2: the loss went from" in done.stderr) == (code == 3)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("bad", "the output of layer 1 (Bad) is the first that is not finite; its inputs are finite"),
     ("root", "Function 'MulBackward0' returned nan values in its 0th output. The gradient turns NaN before the "
              "output of layer 1")],
)  # fmt: skip
def test_an_anomaly_names_the_layer(project: Path, fault: str, said: str) -> None:
    done = run(project, "debug=anomaly", f"task.fault={fault}")
    assert done.returncode == 3, done.stderr
    assert said in done.stderr


def test_without_debug_a_gradient_that_is_not_finite_is_named_too(project: Path) -> None:
    done = run(project, "task.fault=root", "nonfinite.limit=1")
    assert "not finite in the gradient of 0.bias and of 1 parameters before it" in done.stdout


@pytest.mark.parametrize(("fault", "code"), [("''", 0), ("clock", 3)])
def test_steps_that_differ_when_they_are_taken_again_are_found(project: Path, fault: str, code: int) -> None:
    done = run(project, "debug=determinism", f"task.fault={fault}")
    assert done.returncode == code, done.stderr
    said = "2 steps from step 0 are the same twice" if code == 0 else "differ when they are taken again, first in the "
    assert said in done.stdout + done.stderr


def test_a_profile_is_a_trace_and_a_table(project: Path) -> None:
    done = run(project, "debug=profile")
    assert done.returncode == 0, done.stderr
    assert "aten::" in done.stdout
    (trace,) = (project / "runs/a/attempts/0001").glob("profile-rank-0000-step-00000007.trace.json.gz")
    names = Counter(event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
    assert names["Optimizer.step#AdamW.step"] == 5


def typed(project: Path, words: list[str], lines: list[str]) -> tuple[int, str]:
    """Run a command on a terminal; type a line at each prompt of pdb."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project)
        os.execve(sys.executable, [*EVERSTEP, "run", *WORDS, *words], environment())
    said, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            said += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if said.rstrip().endswith(b"(Pdb)") and lines:
            os.write(terminal, f"{lines.pop(0)}\n".encode())
            said += b"\n"
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), said.decode(errors="replace")


def test_leaving_pdb_is_a_stop_and_starts_nothing_again(project: Path) -> None:
    code, said = typed(project, ["job.nproc=1", "task.fault=break"], ["p self.calls", "q"])
    assert code == 75, said
    assert "stopped in the debugger" in said
    assert "Traceback" not in said
    assert len(RunFolder(str(project / "runs/a")).attempts()) == 1


def test_pdb_opens_where_an_error_was_raised(project: Path) -> None:
    code, said = typed(project, ["--pdb", "job.nproc=1", "task.fault=raise"], ["p self.calls + 1000", "q"])
    assert "1009" in said
    assert code == 1
    assert len(RunFolder(str(project / "runs/a")).attempts()) == 1


def test_one_rank_of_several_gets_the_terminal(project: Path) -> None:
    words = ["job.nproc=2", "debug.rank=1", "task.fault=break", "job.env={OMP_NUM_THREADS: '1'}"]
    code, said = typed(project, words, ["import os; print('rank', os.environ['RANK'])", "c"])
    assert code == 0, said
    assert "rank 1" in said


def test_pdb_on_several_processes_asks_for_the_rank(project: Path) -> None:
    done = everstep(project, "run", "--pdb", *WORDS, "job.nproc=2")
    assert done.returncode == 2
    assert "debug.rank=N, or job.nproc=1" in done.stderr


def test_a_run_that_is_going_shows_its_stacks_and_a_profile(project: Path) -> None:
    words = [*EVERSTEP, "run", *WORDS, "job.nproc=1", "task.fault=slow", "steps=100000"]
    going = subprocess.Popen(
        words, cwd=project, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: (project / "runs/a/attempts/0001/metrics.jsonl").exists(), 60)
        stacks = everstep(project, "attach", "a")
        assert "in loss" in stacks.stdout or "py-spy" in stacks.stdout + stacks.stderr, stacks.stderr
        profile = everstep(project, "profile", "a", "--steps", "3")
        assert profile.returncode == 0, profile.stderr
        assert "aten::" in profile.stdout
        (trace,) = (project / "runs/a/attempts/0001").glob("profile-*.trace.json.gz")
        names = Counter(e.get("name") for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
        assert names["Optimizer.step#AdamW.step"] == 3
        assert everstep(project, "attach", "a", "--rank", "3").returncode == 2
        assert going.poll() is None
    finally:
        going.send_signal(signal.SIGINT)
        assert going.wait(60) == 75
    assert "is not going" in everstep(project, "profile", "a").stderr


def test_trackers_have_each_step_once_after_kills(project: Path) -> None:
    """Three ranks' deaths, each at another step, while W&B, TensorBoard and MLflow are written."""
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    words = [*EVERSTEP, "run", *WORDS, "job.nproc=1", "task.fault=slow", "steps=120", "checkpoint.every=10",
             "log=mlflow", "log.every=1", "log.tensorboard=true", "log.wandb.enabled=true",
             "log.wandb.mode=offline"]  # fmt: skip
    going = subprocess.Popen(words, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = RunFolder(str(project / "runs/a"))
    for attempt, step in ((1, 25), (2, 55), (3, 80)):
        until(lambda attempt=attempt, step=step: reached(folder, attempt) >= step, 90)  # type: ignore[misc]
        os.kill(pid_of(folder, attempt), signal.SIGKILL)
    said, _ = going.communicate(timeout=200)
    assert going.returncode == 0, said.decode()
    wanted = list(range(1, 121))
    assert mlflow_steps(project / "runs/a") == wanted
    assert tensorboard_steps(project / "runs/a") == wanted
    steps = wandb_steps(project / "runs/a")
    assert max(Counter(steps).values()) == 1
    assert sorted(steps) == wanted, said.decode()


def reached(folder: RunFolder, attempt: int) -> int:
    return max((int(record["step"]) for record in folder.lines(attempt, "metrics.jsonl")), default=0)


def pid_of(folder: RunFolder, attempt: int) -> int:
    log = folder.storage.read(folder.attempt(attempt, "rank-0000.log")).decode()
    return int(log.split(" is process ")[1].split()[0])


def mlflow_steps(run_folder: Path) -> list[int]:
    from mlflow.tracking import MlflowClient

    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=(run_folder / "mlflow").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("everstep").experiment_id])
    return sorted(each.step for each in client.get_metric_history(found.info.run_id, "train/loss"))


def tensorboard_steps(run_folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def wandb_steps(run_folder: Path) -> list[int]:
    from everstep.trainer.reporting.trackers.wandb_sink import rows

    return [
        row["step"]
        for file in run_folder.glob("wandb/offline-run-*/*.wandb")
        for row in rows(file)
        if "train/loss" in row
    ]


SCRIPT = """
import os, sys
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
starts = Path(sys.argv[2])
number = len(list(starts.iterdir()))
dist.barrier()
if dist.get_rank() == 0:
    (starts / f"{number}").write_text(f"{dist.get_world_size()} {sys.argv[1]}")
dist.destroy_process_group()
sys.exit(0 if number == 1 else 7)
"""


def test_any_script_for_torchrun_is_started_again_until_it_ends_well(project: Path) -> None:
    (project / "train_my_way.py").write_text(SCRIPT)
    (project / "starts").mkdir()
    words = ("run", "job.nproc=2", "run=script", "--", "train_my_way.py", "--any", "starts")
    done = everstep(project, *words)
    assert done.returncode == 0, done.stderr
    assert [(project / "starts" / name).read_text() for name in ("0", "1")] == ["2 --any", "2 --any"]
    assert "ended with exit code 7; starting again (1 of 3" in done.stderr
    assert "state        done" in everstep(project, "status", "script").stdout
    (project / "starts/2").write_text("")
    assert everstep(project, *words[:2], "job.max_restarts=0", *words[2:]).returncode == 1

"""The real agents: what is left when torchrun, its workers or the launcher are killed, and how it goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.outcome import Outcome
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_metrics
from support import TESTS
from support.processes import below, children
from support.ranks import folder

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("warm")]
TOY = ["--config-dir", str(TESTS / "conf"), "experiment=toy", "run=toy"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
Start = Callable[..., subprocess.Popen[bytes]]
KILLS = 6


def until(fits: Callable[[], object], deadline_s: float = 60.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not fits():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return "Z"

    return [pid for pid in pids if state(pid) != "Z"]


def step_of(root: Path, attempt: int) -> int:
    """The last step that an attempt has recorded; 0 before its first."""
    file = root / f"toy/attempts/{attempt:04d}/metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith(b"}") else 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command that trains the toy below tmp_path; nothing of it is left afterwards."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(*command: str, root: Path = tmp_path) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "printed").open("ab") as printed:
            begun.append(subprocess.Popen([*command, f"run_root={root}"], env=env, stdout=printed, stderr=printed))
        return begun[-1]

    yield begin
    for process in begun:
        for pid in [*below(process.pid), process.pid]:
            if alive([pid]):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def test_every_killed_worker_is_recovered_from_at_the_first_restart(start: Start, tmp_path: Path) -> None:
    """Stock torchrun, one agent, one shared store for all restarts: 6 kills, 6 recoveries, no restart wasted."""
    draws = random.Random(1)
    agent = start(*TORCHRUN, f"--max-restarts={KILLS}", "--monitor-interval=0.1", "-m", "everstep.trainer", *TOY,
                  "steps=1000000", "checkpoint.every=50", "evaluate.every=null", "log.every=5")  # fmt: skip
    for attempt in range(1, KILLS + 2):
        until(lambda number=attempt: step_of(tmp_path, number) > 0)
        assert len(folder(tmp_path).attempts()) == attempt
        if attempt <= KILLS:
            os.kill(draws.choice(children(agent.pid)), signal.SIGKILL)
    steps = list(read_metrics(folder(tmp_path)))
    assert steps == list(range(5, steps[-1] + 1, 5))


def test_a_killed_agent_takes_its_workers_along(start: Start, tmp_path: Path) -> None:
    agent = start(
        *TORCHRUN, "-m", "everstep.trainer", *TOY, "steps=1000000", "checkpoint.every=50", "evaluate.every=null"
    )
    until(lambda: step_of(tmp_path, 1) > 0)
    workers = children(agent.pid)
    assert len(workers) == 2
    agent.kill()
    until(lambda: not alive(workers), deadline_s=5)


def test_a_run_goes_on_to_the_same_bits_after_the_agent_and_then_everything_is_killed(
    start: Start, tmp_path: Path
) -> None:
    everstep = [sys.executable, "-m", "everstep.launch", "run", *TOY, "job.nproc=2", "steps=200", "checkpoint.every=30"]
    whole = start(*everstep, root=tmp_path / "whole")
    assert whole.wait(60) == 0
    process = start(*everstep)
    until(lambda: step_of(tmp_path, 1) > 50)
    (agent,) = children(process.pid)
    os.kill(agent, signal.SIGKILL)
    until(lambda: step_of(tmp_path, 2) > 100)
    for pid in [process.pid, *below(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert start(*everstep).wait(60) == 0, (tmp_path / "printed").read_text()
    assert len(folder(tmp_path).attempts()) == 3
    assert list(differences(locate(folder(tmp_path).url), locate(folder(tmp_path / "whole").url))) == []


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_to_everstep_ends_as_preempted_with_a_checkpoint(start: Start, tmp_path: Path, nproc: int) -> None:
    process = start(sys.executable, "-m", "everstep.launch", "run", *TOY, f"job.nproc={nproc}", "steps=1000000",
                    "checkpoint.every=1000000", "evaluate.every=null")  # fmt: skip
    until(lambda: step_of(tmp_path, 1) > 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == Outcome.preempted.exit_code, (tmp_path / "printed").read_text()
    ending = folder(tmp_path).last_ending()
    assert ending is not None
    assert ending.outcome is Outcome.preempted
    assert f"step-{ending.step:08d}" in locate(folder(tmp_path).url)[1]
    assert "Traceback" not in (tmp_path / "printed").read_text()


def test_everstep_starts_again_with_a_smaller_microbatch_when_memory_is_short(start: Start, tmp_path: Path) -> None:
    process = start(sys.executable, "-m", "everstep.launch", "run", *TOY, "job.nproc=2", "parallel=fsdp",
                    "micro_batch=4", "task.max_batch=1", "job.max_restarts=0")  # fmt: skip
    assert process.wait(90) == 0, (tmp_path / "printed").read_text()
    assert len(folder(tmp_path).attempts()) == 3


def test_torchrun_alone_restarts_into_the_same_run_without_a_name(start: Start, tmp_path: Path) -> None:
    unnamed = [text for text in TOY if text != "run=toy"]
    agent = start(
        *TORCHRUN, "--max-restarts=1", "--monitor-interval=0.1", "-m", "everstep.trainer", *unnamed, "steps=300"
    )
    until(lambda: list(tmp_path.glob("toy-*/attempts/0001/metrics.jsonl")))
    os.kill(children(agent.pid)[1], signal.SIGKILL)
    assert agent.wait(60) == 0, (tmp_path / "printed").read_text()
    assert len(list(tmp_path.glob("toy-*"))) == 1

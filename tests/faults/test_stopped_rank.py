"""A stopped rank under real launchers: reported, killed beside its agent, and the run goes on by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.outcome import Outcome
from everstep.trainer.reporting.sinks import read_lines
from support import TESTS
from support.processes import alive, until
from support.ranks import folder
from support.strangers import needs_namespaces, network

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

STALL_S = 3.0
KINDS = {
    "stop": "frozen",
    "loop": "stalled",
    "sleep": "stalled",
    "hold_lock_busy": "frozen",
    "hold_lock_blocked": "frozen",
    "join_alone": "stalled",
}
"""Kind of stall by the way in which a rank hangs."""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[object]:
    """Starts a program with the words of a toy that hangs once; nothing of it is left afterwards."""
    begun: list[subprocess.Popen[bytes]] = []
    toy = ["--config-dir", str(TESTS / "conf"), "experiment=toy", "run=toy", f"run_root={tmp_path}",
           "task._target_=support.hangs.HangingTask", "+task.number=20", f"+task.once={tmp_path}/once",
           "plugins=[support.toy,support.hangs]", f"stop.stall_s={STALL_S}"]  # fmt: skip

    def start(*command: str, env: dict[str, str] | None = None, rank: int = 1, how: str = "stop"
              ) -> subprocess.Popen[bytes]:  # fmt: skip
        path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
        given = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
        with (tmp_path / "printed").open("ab") as printed:
            words = [*command, *toy, f"+task.rank={rank}", f"+task.how={how}"]
            begun.append(subprocess.Popen(words, env=given, cwd=tmp_path, stdout=printed, stderr=printed))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def assert_killed_and_gone_on(root: Path, processes: list[subprocess.Popen[bytes]], how: str = "stop") -> None:
    outcome = root / "toy/attempts/0001/outcome.json"
    until(outcome.exists, 60)
    reported = time.monotonic()
    (event,) = (event for event in read_lines(folder(root), "events.jsonl") if event["event"] == "stalled")
    (culprit,) = event["culprits"]
    until(lambda: not alive(culprit["pid"]), 5.0)
    assert time.monotonic() - reported < 5.0
    assert (culprit["rank"], culprit["phase"], event["kind"]) == (1, "forward", KINDS[how])
    assert (culprit["state"] == "T") == (how == "stop")
    assert f"in {how}" in culprit["line"]
    ending = folder(root).ending(1)
    assert ending is not None
    assert ending.outcome is Outcome.stalled
    assert [process.wait(200) for process in processes] == [0] * len(processes), (root / "printed").read_text()
    last = folder(root).last_ending()
    assert last is not None
    assert (last.outcome, folder(root).attempts()) == (Outcome.done, [1, 2])


def test_everstep_run_kills_a_stopped_rank_after_the_report_and_starts_again(begin, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = begin(sys.executable, "-m", "everstep.launch", "run", "job.nproc=2")
    assert_killed_and_gone_on(tmp_path, [process])
    said = (tmp_path / "printed").read_text()
    assert said.count("error: ") == 1
    assert "error: frozen: rank 1 on" in said
    assert "stalled at step " in said
    assert "starting again (1 of" in said
    command = [sys.executable, "-m", "everstep.launch", "status", str(tmp_path / "toy"), "--json"]
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert '"outcome": "stalled"' in shown
    assert '"stalled": 0.0' not in shown


def test_one_process_that_its_own_timer_has_ended_has_stalled_and_starts_again(begin, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = begin(sys.executable, "-m", "everstep.launch", "run", "job.nproc=1", rank=0,
                    how="hold_lock_busy")  # fmt: skip
    assert process.wait(200) == 0, (tmp_path / "printed").read_text()
    ending = folder(tmp_path).ending(1)
    assert ending is not None
    assert ending.outcome is Outcome.stalled
    assert "rank 0 was ended by its watchdog: no Python ran in it" in ending.reason
    assert "in hold_lock_busy" in (tmp_path / "toy/attempts/0001/rank-0000.log").read_text()


@needs_namespaces
@pytest.mark.parametrize("how", KINDS)
def test_on_two_nodes_of_a_network_the_rank_beside_the_hung_one_ends_it(begin, tmp_path: Path, how: str) -> None:  # type: ignore[no-untyped-def]
    with network() as other:
        with socket.create_server((other.here, 0)) as free:
            port = free.getsockname()[1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={other.here}:{port}", "--rdzv-id=toy", "--max-restarts=1",
                    "--monitor-interval=0.1"]  # fmt: skip
        trainer = ["-m", "everstep.trainer"]
        here = begin(*torchrun, "--rdzv-conf=is_host=1", f"--local-addr={other.here}", "--nproc-per-node=1", *trainer,
                     env={"GLOO_SOCKET_IFNAME": f"{other.name}a"}, how=how)  # fmt: skip
        there = begin("ip", "netns", "exec", other.name, *torchrun, "--rdzv-conf=is_host=0",
                      f"--local-addr={other.there}", "--nproc-per-node=2", *trainer,
                      env={"GLOO_SOCKET_IFNAME": f"{other.name}b"}, how=how)  # fmt: skip
        assert_killed_and_gone_on(tmp_path, [here, there], how)

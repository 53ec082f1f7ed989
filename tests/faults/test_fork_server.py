"""The fork server behind `everstep run`: kills of ranks, of the server and of the launcher, and refusals to fork."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from everstep.processes import command_line
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from support import TESTS
from support.processes import alive, below, children, until
from support.ranks import folder

pytestmark = pytest.mark.process
TOY = ["--config-dir", str(TESTS / "conf"), "experiment=toy", "run=toy", "job.max_restarts=20"]
ENDLESS = ["steps=1000000", "checkpoint.every=20", "evaluate.every=null", "log.every=5"]
KILLS = 100 if "EVERSTEP_LONG" in os.environ else 8
MOST_GROWN_MB = 8
"""Growth of a process that a hundred kills may leave, in pages that forks have made its own."""


class Run:
    """`everstep run` of the toy below a folder."""

    def __init__(self, root: Path, *words: str, nproc: int = 2, path: tuple[Path, ...] = ()) -> None:
        self.root = root
        places = os.pathsep.join(map(str, [*path, TESTS.parent, TESTS]))
        env = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, "-m", "everstep.launch", "run", *TOY, f"run_root={root}", f"job.nproc={nproc}", *words]
        self.printed = root / "printed"
        with self.printed.open("ab") as printed:
            self.process = subprocess.Popen(argv, env=env, stdout=printed, stderr=printed)

    @property
    def server(self) -> int:
        """The fork server, or torchrun's agent; the launcher also asks git, say, while it starts."""
        (pid,) = self._of_trainer()
        return pid

    def _of_trainer(self) -> list[int]:
        return [pid for pid in children(self.process.pid) if "everstep.trainer" in " ".join(command_line(pid))]

    @property
    def ranks(self) -> list[int]:
        return [rank for pid in self._of_trainer() for rank in children(pid)]

    def step_of(self, attempt: int) -> int:
        file = self.root / f"toy/attempts/{attempt:04d}/metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith(b"}") else 0

    def newest_checkpoint(self) -> str:
        """Name of the newest committed checkpoint; empty without one."""
        return max((file.parent.name for file in self.root.glob("toy/checkpoints/*/manifest.json")), default="")

    def await_new_checkpoint(self, after: str) -> str:
        """Wait for a checkpoint newer than `after`; without one, the launcher waits longer before each start."""
        until(lambda: self.newest_checkpoint() > after or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.printed.read_text()
        return self.newest_checkpoint()

    def await_steps(self, attempt: int) -> None:
        until(lambda: self.step_of(attempt) > 0 or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.printed.read_text()

    def ended(self, seconds: float = 90) -> str:
        """Wait until it is done; return all that it has printed."""
        assert self.process.wait(seconds) == 0, self.printed.read_text()
        return self.printed.read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    begun: list[Run] = []

    def begin(*words: str, nproc: int = 2, path: tuple[Path, ...] = (), root: Path = tmp_path) -> Run:
        root.mkdir(exist_ok=True)
        begun.append(Run(root, *words, nproc=nproc, path=path))
        return begun[-1]

    yield begin
    for each in begun:
        for pid in [*below(each.process.pid), each.process.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        each.process.wait()


def held_by(pid: int) -> tuple[int, int]:
    """Open descriptors and threads of a process."""
    process = psutil.Process(pid)
    return process.num_fds(), process.num_threads()


def memory_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


@pytest.mark.parametrize("nproc", [1, 2])
def test_each_killed_rank_is_forked_anew_and_neither_server_nor_launcher_grows(
    run: Callable[..., Run], tmp_path: Path, nproc: int
) -> None:
    started = run(*ENDLESS, nproc=nproc)
    started.await_steps(1)
    both = started.server, started.process.pid
    held, newest = [], ""
    for kill in range(1, KILLS + 1):
        newest = started.await_new_checkpoint(newest)
        os.kill(started.ranks[kill % nproc], signal.SIGKILL)
        started.await_steps(kill + 1)
        held.append([(*held_by(pid), memory_mb(pid)) for pid in both])
    for first, last in zip(held[1], held[-1], strict=True):
        assert last[:2] == first[:2]
        assert last[2] < first[2] + MOST_GROWN_MB
    assert started.server == both[0]
    endings = [folder(started.root).ending(number) for number in range(1, KILLS + 1)]
    assert [each.reason if each else None for each in endings] == [
        f"rank {kill % nproc} was killed by SIGKILL" for kill in range(1, KILLS + 1)
    ]
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(60) == 75
    last = int(started.newest_checkpoint().split("-")[1])
    run(*ENDLESS, f"steps={last}", nproc=nproc, root=tmp_path / "whole").ended()
    assert list(differences(locate(folder(tmp_path).url), locate(folder(tmp_path / "whole").url))) == []


@pytest.mark.parametrize("warm", ["true", "false"])
def test_killed_ranks_agents_and_launchers_lead_to_the_bits_of_an_undisturbed_run(
    run: Callable[..., Run], tmp_path: Path, warm: str
) -> None:
    words = [f"job.warm={warm}", "steps=300", "checkpoint.every=20"]
    run(*words, root=tmp_path / "whole").ended()
    started = run(*words)
    started.await_steps(1)
    os.kill(started.ranks[1], signal.SIGKILL)
    started.await_steps(2)
    os.kill(started.server, signal.SIGKILL)  # without a fork server: torchrun's agent
    started.await_steps(3)
    left = below(started.process.pid)
    started.process.kill()
    started.process.wait()
    until(lambda: not any(map(alive, left)))
    run(*words).ended()
    assert len(folder(tmp_path).attempts()) == 4
    assert list(differences(locate(folder(tmp_path).url), locate(folder(tmp_path / "whole").url))) == []


def test_a_rank_that_cannot_end_does_not_hold_up_the_next_start(run: Callable[..., Run]) -> None:
    started = run(*ENDLESS)
    started.await_steps(1)
    first, second = started.ranks
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    started.await_steps(2)
    assert not alive(first)
    assert time.monotonic() - began < 20  # torchrun would wait for 30 s, and then begin


def test_a_fork_server_that_hangs_is_replaced(run: Callable[..., Run]) -> None:
    started = run(*ENDLESS, "job.grace_s=1")
    started.await_steps(1)
    server, ranks = started.server, started.ranks
    os.kill(server, signal.SIGSTOP)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    started.await_steps(2)
    assert not alive(server)


def test_ctrl_c_saves_once_and_leaves_nothing_behind_the_second_time(run: Callable[..., Run]) -> None:
    started = run(*ENDLESS)
    started.await_steps(1)
    left = below(started.process.pid)
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(60) == 75
    assert not any(map(alive, left))
    again = run(*ENDLESS, "checkpoint.every=1000000")
    again.await_steps(2)
    left = below(again.process.pid)
    os.kill(again.ranks[0], signal.SIGSTOP)  # so that it cannot save
    again.process.send_signal(signal.SIGINT)
    until(lambda: "SIGINT" in again.printed.read_text() or (again.root / "toy/stop").exists())
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(60) == 130
    until(lambda: not any(map(alive, left)))


def test_a_stop_before_the_ranks_exist_ends_at_once(run: Callable[..., Run]) -> None:
    started = run(*ENDLESS)
    until(lambda: bool(children(started.process.pid)))
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 75
    assert folder(started.root).attempts() == []


def test_an_interpreter_with_threads_is_not_forked_and_the_run_is_done_all_the_same(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()\n"
    )
    printed = run("steps=20", path=(tmp_path / "path",)).ended()
    assert "ranks are started as new processes, not forked: 2 threads run after the imports" in printed


def test_ranks_draw_different_numbers_from_the_global_generators_before_the_first_step(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    run(
        "steps=2",
        "plugins=[support.toy,support.draws]",
        f"hooks=[{{_target_: support.draws.Draws, file: {tmp_path}/draws}}]",
    ).ended()
    drawn = [json.loads(line) for line in (tmp_path / "draws").read_text().splitlines()]
    assert len(drawn) == 2
    assert drawn[0]["random"] != drawn[1]["random"]
    assert drawn[0]["numpy"] != drawn[1]["numpy"]


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.4])
def test_a_launcher_that_is_killed_as_its_ranks_begin_leaves_none_of_them(
    run: Callable[..., Run], after_s: float
) -> None:
    started = run(*ENDLESS)
    until(lambda: bool(started.ranks), 60)
    time.sleep(after_s)  # the moment of the fault
    left = below(started.process.pid)
    started.process.kill()
    started.process.wait()
    until(lambda: not any(map(alive, left)), 5)

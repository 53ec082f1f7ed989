"""How a run on this machine ends and goes on when its user errs, a rank dies, or nobody reads what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.outcome import Fault, Outcome
from everstep.rank_env import AGENT_PID
from everstep.trainer.step import Stepper
from support import TESTS
from support.processes import alive, children, until
from support.ranks import environment, folder, train

MISTAKES = """
from support import toy

class Mistaken(toy.ToyTask):
    def loss(self, model, batch):
        return model(batch["y"], 1)
"""


@pytest.fixture
def everstep(tmp_path: Path) -> Iterator[object]:
    """Starts `everstep run` of the toy in an empty folder of temporary files; nothing of it is left afterwards."""
    begun: list[subprocess.Popen[str]] = []
    (tmp_path / "tmp").mkdir()
    (tmp_path / "mistakes.py").write_text(MISTAKES)

    def begin(*words: str) -> subprocess.Popen[str]:
        path = os.pathsep.join(map(str, (TESTS.parent, TESTS, tmp_path)))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
        toy = ["--config-dir", str(TESTS / "conf"), "experiment=toy", "run=toy", f"run_root={tmp_path}"]
        command = [sys.executable, "-m", "everstep.launch", "run", *toy, *words]
        begun.append(subprocess.Popen(command, env=env, cwd=tmp_path, text=True, stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.process
@pytest.mark.usefixtures("warm")
def test_a_mistake_of_the_user_is_one_line_with_its_place_and_is_not_tried_again(everstep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = everstep("plugins=[support.toy,mistakes]", "task._target_=mistakes.Mistaken", "job.nproc=2")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    lines = said.splitlines()
    assert len(lines) == 3, said
    assert re.search(r"^error: TypeError: .* \(mistakes.py:6, in loss", lines[1])
    assert lines[2] == "everstep: not started again: before the first step that is a mistake"
    assert folder(tmp_path).attempts() == [1]
    rank = (lines[1].split("rank 1")[1:] and 1) or 0
    assert "Traceback" in folder(tmp_path).storage.read(f"attempts/0001/rank-{rank:04d}.log").decode()


@pytest.mark.process
@pytest.mark.usefixtures("warm")
def test_the_rank_that_was_killed_and_its_signal_are_the_reason_and_nothing_else_is_shown(  # type: ignore[no-untyped-def]
    everstep, tmp_path: Path
) -> None:
    process = everstep("job.nproc=2", "steps=1000000", "evaluate.every=null", "job.max_restarts=0")
    until(lambda: (tmp_path / "toy/progress.json").exists(), 60)
    ranks = children(children(process.pid)[0])
    os.kill(ranks[1], signal.SIGSEGV)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    ending = folder(tmp_path).last_ending()
    assert ending is not None
    assert re.fullmatch(r"rank [01] was killed by SIGSEGV", ending.reason)
    assert said.splitlines()[1:2] == [f"error: {ending.reason}"]
    assert len(said.splitlines()) == 3, said
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.process
@pytest.mark.usefixtures("warm")
def test_a_reader_that_goes_away_does_not_end_training(everstep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = everstep("job.nproc=1", "steps=400", "log.progress=lines", "log.line_every_s=0", "evaluate.every=null")
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    ending = folder(tmp_path).ending(1)
    assert ending is not None
    assert ending.outcome is Outcome.done


@pytest.mark.process
def test_a_rank_whose_agent_is_gone_ends_before_it_has_imported_anything(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    env = {**os.environ, AGENT_PID: str(gone.pid), "TORCHELASTIC_RUN_ID": "x"}
    rank = subprocess.run([sys.executable, "-m", "everstep.trainer", "experiment=toy"], env=env, cwd=TESTS.parent,
                          capture_output=True, timeout=60)  # fmt: skip
    assert (rank.returncode, rank.stdout, rank.stderr) == (-signal.SIGKILL, b"", b"")


@pytest.mark.process
@pytest.mark.parametrize("who", ["launcher", "agent"])
def test_no_rank_outlives_its_agent_that_is_killed_as_ranks_start(everstep, tmp_path: Path, who: str) -> None:  # type: ignore[no-untyped-def]
    process = everstep("job.nproc=2", "job.max_restarts=0")
    until(lambda: any(len(children(child)) == 2 for child in children(process.pid)), 60)
    agent = children(process.pid)[0]
    ranks = children(agent)
    os.kill(process.pid if who == "launcher" else agent, signal.SIGKILL)
    process.wait(60)
    until(lambda: not any(map(alive, ranks)), 20)
    assert folder(tmp_path).attempts() == []


@pytest.mark.dist
def test_the_same_mistake_on_all_ranks_is_shown_once(tmp_path: Path) -> None:
    def mistaken(_: int) -> None:
        def fails(self: Stepper, *_: object) -> None:
            raise KeyError("target")

        Stepper.__call__ = fails  # type: ignore[method-assign]

    ended = train(2, tmp_path, before=mistaken)
    assert ended.codes == [1, 1]
    shown = [line for line in ended.printed.splitlines() if line.startswith("error: ")]
    assert len(shown) == len(ended.printed.splitlines()) == 1, ended.printed
    ending = folder(tmp_path).last_ending()
    assert ending is not None
    assert (ending.fault, ending.error, ending.step) == (Fault.user, "KeyError", 0)
    assert ending.place.endswith("in fails")


@pytest.mark.dist
def test_what_a_rank_lost_gives_way_to_what_the_other_died_of(tmp_path: Path) -> None:
    def slowly_mistaken(rank: int) -> None:
        original = Stepper.__call__

        def fails(self: Stepper, *batches: object) -> None:
            if rank == 1 and self.state.progress.step == 3:
                raise ValueError("mine")
            original(self, *batches)  # type: ignore[arg-type]

        Stepper.__call__ = fails  # type: ignore[assignment, method-assign]

    with environment(**{AGENT_PID: str(os.getpid())}):
        ended = train(2, tmp_path, before=slowly_mistaken)
    assert sorted(ended.codes) == [1, 69], ended.printed
    assert "gloo" not in ended.printed
    ending = folder(tmp_path).last_ending()
    assert ending is not None
    assert (ending.reason, ending.rank, ending.step) == ("ValueError: mine", 1, 3)


@pytest.mark.process
@pytest.mark.usefixtures("warm")
def test_a_breakpoint_of_several_processes_is_refused_in_a_line(everstep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mistakes.py").write_text(MISTAKES.replace("return model", "breakpoint(); return model"))
    process = everstep("plugins=[support.toy,mistakes]", "task._target_=mistakes.Mistaken", "job.nproc=2")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "breakpoint(): 2 processes cannot share a terminal; use job.nproc=1" in said
    assert folder(tmp_path).attempts() == [1]

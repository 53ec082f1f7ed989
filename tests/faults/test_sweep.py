"""Sweeps in processes of their own: killed, doubled, stopped, widened; and what is left of them in the end."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest

from everstep.launch.sweep.leaderboard import ranked
from everstep.launch.sweep.state import evaluations
from everstep.run_folder import RunFolder
from support.processes import alive, until
from support.sweep_processes import (
    FAKE,
    REAL,
    TESTS,
    asked,
    children,
    ended,
    ends,
    kill,
    order,
    plan,
    results,
    story,
    sweep,
    told,
)
from support.warm import forked

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("warm")]
GRID = ["optimizer.lr=0.001,0.01,0.1", "seed=range(0,3)", "steps=20", "job.max_parallel=4",
        "sweep.poll_s=0.05"]  # fmt: skip


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sweep `calm` of 9 trials, which has ended undisturbed."""
    where = tmp_path_factory.mktemp("calm")
    with forked():
        ended(sweep(FAKE, where, *GRID, "run=calm"))
    return where


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """While it is there, each trial waits in its middle; remove it and they go on."""
    file = tmp_path / "hold"
    file.touch()
    return file


def reached_its_middle(cwd: Path) -> bool:
    return any((cwd / "runs/s/trials").glob("*/checkpoints/step-00000015-*/manifest.json"))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sweep_whose_driver_and_trials_are_killed_twice_ends_like_one_that_was_left_alone(
    calm: Path, tmp_path: Path, seed: int
) -> None:
    draws = random.Random(seed)
    for done in sorted(draws.sample(range(1, 7), 2)):
        driver = sweep(FAKE, tmp_path, *GRID, "run=torn", FAKE_TRAINER_PAUSE_S="0.01")
        until(lambda: len(story(tmp_path, "torn").order) >= 2 * done and len(children(driver.pid)) >= 2, 60)  # noqa: B023
        pids = children(driver.pid)
        for pid in draws.sample(pids, len(pids) // 2):
            os.kill(pid, signal.SIGKILL)
        kill(driver)
        until(lambda: not any(map(alive, pids)))  # noqa: B023
    ended(sweep(FAKE, tmp_path, *GRID, "run=torn"))
    assert results(tmp_path, "torn") == results(calm, "calm")
    assert order(tmp_path, "torn") == order(calm, "calm")
    assert set(map(tuple, ends(tmp_path, "torn").values())) == {(20,)}
    assert sorted(told(tmp_path, "torn")) == [(trial, 0) for trial in range(9)]


def test_a_trial_that_is_killed_alone_goes_on_under_the_same_driver(tmp_path: Path, hold: Path) -> None:
    driver = sweep(FAKE, tmp_path, "seed=0,1", "steps=20", "run=s", "sweep.poll_s=0.05", FAKE_TRAINER_HOLD=str(hold))
    until(lambda: reached_its_middle(tmp_path), 60)
    os.kill(children(driver.pid)[0], signal.SIGKILL)
    hold.unlink()
    ended(driver)
    assert list(ends(tmp_path, "s").values()) == [[20], [20]]
    attempts = [len(list(folder.glob("attempts/*"))) for folder in (tmp_path / "runs/s/trials").iterdir()]
    assert sorted(attempts) == [1, 2]


def test_a_second_driver_says_who_drives_and_changes_nothing(tmp_path: Path, hold: Path) -> None:
    words = ["seed=0,1", "steps=20", "run=s", "sweep.poll_s=0.05"]
    first = sweep(FAKE, tmp_path, *words, FAKE_TRAINER_HOLD=str(hold))
    until(lambda: (tmp_path / "runs/s/leases/0001.json").exists(), 60)
    said = ended(sweep(FAKE, tmp_path, *words), code=2)
    assert f"driven by process {first.pid}" in said
    assert f"process {first.pid}" in asked(tmp_path, "status", "s")
    hold.unlink()
    ended(first)
    assert set(map(tuple, ends(tmp_path, "s").values())) == {(20,)}


def test_a_finished_sweep_is_not_run_again_and_a_wider_one_runs_what_is_missing(tmp_path: Path) -> None:
    words = ["steps=10", "run=s", "sweep.poll_s=0.05", "optimizer.lr=0.01,0.1"]
    ended(sweep(FAKE, tmp_path, *words, "seed=0,1"))
    before = results(tmp_path, "s")
    ended(sweep(FAKE, tmp_path, *words, "seed=0,1"))
    assert results(tmp_path, "s") == before
    ended(sweep(FAKE, tmp_path, *words, "seed=0,1,2"))
    after = results(tmp_path, "s")
    assert len(after) == 6
    assert before.items() <= after.items()
    assert all(len(list(folder.glob("attempts/*"))) == 1 for folder in (tmp_path / "runs/s/trials").iterdir())


def test_stopping_saves_the_trials_and_resume_goes_on_and_asks_for_more(tmp_path: Path, hold: Path) -> None:
    words = ["optimizer.lr=tag(log,interval(1e-4,1))", "sweep.sampler=random", "sweep.trials=3", "steps=20", "run=s"]
    driver = sweep(FAKE, tmp_path, *words, "sweep.poll_s=0.05", FAKE_TRAINER_HOLD=str(hold))
    until(lambda: reached_its_middle(tmp_path), 60)
    driver.send_signal(signal.SIGINT)
    assert "resume" in ended(driver, code=75)
    assert [trial.is_open for trial in story(tmp_path, "s").trials] == [True]
    (run,) = (tmp_path / "runs/s/trials").iterdir()
    outcome = json.loads((run / "attempts/0001/outcome.json").read_text())
    assert outcome["outcome"] == "preempted"
    resumed = sweep(FAKE, tmp_path, *words[:2], "sweep.trials=5", *words[3:], "sweep.poll_s=0.05")
    ended(resumed)
    assert set(map(tuple, ends(tmp_path, "s").values())) == {(20,)}
    assert len(ends(tmp_path, "s")) == 5
    assert json.loads((run / "attempts/0002/restored.json").read_text())["step"] == outcome["step"] == 15


def test_cancel_from_another_shell_stops_driver_and_trials(tmp_path: Path, hold: Path) -> None:
    driver = sweep(FAKE, tmp_path, "seed=0,1", "steps=20", "run=s", "sweep.poll_s=0.05", FAKE_TRAINER_HOLD=str(hold))
    until(lambda: any((tmp_path / "runs/s/trials").glob("*/attempts/0001/metrics.jsonl")), 60)
    assert "is cancelled" in asked(tmp_path, "cancel", "s")
    assert "the sweep is cancelled" in ended(driver, code=75)
    assert list(ends(tmp_path, "s").values()) == [[]]


def test_failures_are_marked_and_the_sweep_goes_on_until_there_are_too_many(tmp_path: Path) -> None:
    words = ["optimizer.lr=8,9,0.01", "seed=range(0,3)", "steps=10", "job.max_restarts=0", "sweep.poll_s=0.05"]
    ended(sweep(FAKE, tmp_path, *words, "run=all"))
    verdicts = [row.state for row in ranked(plan(tmp_path, "all"), story(tmp_path, "all"))]
    assert sorted(verdicts) == ["done"] * 6 + ["failed"] * 3
    best = ranked(plan(tmp_path, "all"), story(tmp_path, "all"))[0]
    assert best.trial.values == {"optimizer.lr": 0.01, "seed": 0}
    assert "sweep.max_failures=2" in ended(sweep(FAKE, tmp_path, *words, "run=few", "sweep.max_failures=2"), code=1)
    assert len(story(tmp_path, "few").trials) == 2


def test_a_trial_that_measures_something_else_fails_with_what_there_is(tmp_path: Path) -> None:
    ended(sweep(FAKE, tmp_path, "seed=0,1", "steps=5", "run=s", "sweep.metric=accuracy", "sweep.poll_s=0.05"))
    (first, _) = story(tmp_path, "s").trials
    assert first.last is not None
    assert first.last.reason == "no metric accuracy (there is loss); change sweep.metric"


def test_asha_goes_on_from_checkpoints_and_trains_nothing_twice(tmp_path: Path) -> None:
    words = ["optimizer.lr=0.001,0.01,0.1", "seed=range(0,3)", "steps=45", "sweep.pruner=asha", "run=s"]
    ended(sweep(FAKE, tmp_path, *words, "sweep.poll_s=0.05", "job.max_parallel=3"))
    found = ends(tmp_path, "s")
    assert sorted(map(tuple, found.values()), key=len) == [(5,)] * 6 + [(5, 15)] * 2 + [(5, 15, 45)]
    (winner,) = [name for name, steps in found.items() if len(steps) == 3]
    assert winner.startswith("lr=0.01,seed=0-")
    runs = tmp_path / "runs/s/trials"
    assert [json.loads(file.read_text())["step"] for file in sorted((runs / winner).glob("attempts/*/restored.json"))
            ] == [0, 5, 15]  # fmt: skip
    steps = [json.loads(line)["step"] for file in sorted((runs / winner).glob("attempts/*/metrics.jsonl"))
             for line in file.read_text().splitlines() if json.loads(line)["kind"] == "train"]  # fmt: skip
    assert steps == list(range(1, 46))
    assert order(tmp_path, "s")[0] == winner


def test_a_trial_that_stops_getting_better_is_stopped_and_counts(tmp_path: Path, hold: Path) -> None:
    # A rate of 9 gives NaN at every evaluation, so nothing gets better.
    words = ["optimizer.lr=9,0.01", "steps=20", "sweep.pruner=patience", "sweep.patience=2", "run=s"]
    driver = sweep(FAKE, tmp_path, *words, "sweep.poll_s=0.05", "job.max_parallel=1", FAKE_TRAINER_HOLD=str(hold))
    until(lambda: len(told(tmp_path, "s")) == 1, 60)
    hold.unlink()
    ended(driver)
    states = {row.trial.values["optimizer.lr"]: row.state for row in ranked(plan(tmp_path, "s"), story(tmp_path, "s"))}
    assert states == {9: "pruned", 0.01: "done"}
    first = story(tmp_path, "s").trials[0].last
    assert first is not None
    assert first.step == 15


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc"])
def test_every_sampler_drives_a_sweep_to_its_end(tmp_path: Path, sampler: str) -> None:
    words = ["optimizer.lr=tag(log,interval(1e-4,1))", "clip=interval(0.5,2)", f"sweep.sampler={sampler}",
             "sweep.trials=6", "steps=5", "sweep.poll_s=0.05", "run=s", "job.max_parallel=2"]  # fmt: skip
    ended(sweep(FAKE, tmp_path, *words))
    assert [trial.is_open for trial in story(tmp_path, "s").trials] == [False] * 6


REAL_WORDS = ["experiment=toy", "schedule=cosine", "steps=18", "evaluate.every=null"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a sweep `s` of real trainings has come to its end."""
    where = tmp_path_factory.mktemp("trained")
    words = ["optimizer.lr=0.01,0.02,0.04", "sweep.metric=mae", "sweep.pruner=asha", "job.max_parallel=2", "run=s"]
    with forked():
        ended(sweep(REAL, where, *REAL_WORDS[1:], *words, "sweep.poll_s=0.1"), seconds=250)
    return where


def test_a_trial_is_an_ordinary_run_for_every_verb_and_gives_its_values_to_another(trained: Path) -> None:
    board = json.loads(asked(trained, "leaderboard", "s", "--json"))
    assert [row["state"] for row in board] == ["done", "rung 1 of 3", "rung 1 of 3"]
    assert board[1]["mae"] <= board[2]["mae"]
    assert board[0]["goodput"] > 0
    assert f"{board[0]['name']}  done" in asked(trained, "ls", "runs/s/trials")
    assert "state        done" in asked(trained, "status", f"runs/s/trials/{board[0]['name']}")
    config = asked(trained, "run", "--cfg", "--config-dir", str(TESTS / "conf"), *REAL_WORDS, "--from", "s/best")
    assert f"lr: {board[0]['values']['optimizer.lr']}" in config
    asked(trained, "leaderboard", "s", "--csv", "board.csv", "--metric", "loss")
    assert (trained / "board.csv").read_text().splitlines()[0].startswith("trial,name,state,best,loss")


def test_a_promoted_training_ends_like_one_that_was_never_stopped(trained: Path) -> None:
    assert sorted(map(tuple, ends(trained, "s").values())) == [(2,), (2,), (2, 6, 18)]
    asked(trained, "run", "--config-dir", str(TESTS / "conf"), *REAL_WORDS, "job.nproc=1", "run=straight",
          "--from", "s/best")  # fmt: skip
    best = ranked(plan(trained, "s"), story(trained, "s"))[0]
    straight = evaluations(RunFolder(str(trained / "runs/straight")))[18]
    assert best.values == (straight["mae"],)
    assert best.step == 18

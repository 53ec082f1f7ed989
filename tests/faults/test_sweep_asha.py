"""Asha beside the grid on handwritten digits: real trainings, one after the other in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from everstep.frozen_config import settle as settle_run
from everstep.launch.job_start.signals import Signals
from everstep.launch.sweep.driver import Driver
from everstep.launch.sweep.leaderboard import Row, ranked
from everstep.launch.sweep.lease import take
from everstep.launch.sweep.plan import Plan, plan, settle
from everstep.launch.sweep.workers import EndedTrial, Refused, Task
from everstep.run_folder import METRICS, RunFolder
from everstep.trainer.stop import Stop
from everstep.trainer.worker import attempt

GRID = ["experiment=digits", "optimizer.lr=1e-3,4e-3,1.6e-2", "model.width=8,16,32", "model.depth=2", "micro_batch=64",
        "steps=135", "schedule.warmup_steps=4", "evaluate.every=null", "log.every=1", "log.progress=off",
        "sweep.poll_s=0.001"]  # fmt: skip


class InTurn:
    """Workers that train a trial until it ends before they take the next."""

    room = 1
    queues = False

    def __init__(self) -> None:
        self.over: list[EndedTrial] = []

    def adopt(self, tasks: list[Task]) -> list[Task]:
        return []

    def start(self, tasks: Sequence[Task]) -> list[Refused]:
        for task in tasks:
            settle_run(task.config, task.folder)
            code = attempt(["--frozen", task.folder.storage.url], Stop())
            self.over.append(EndedTrial(task, None, code))
        return []

    def poll(self) -> list[EndedTrial]:
        over, self.over = self.over, []
        return over

    def stop(self, task: Task) -> None:
        raise AssertionError("none runs while a driver looks")

    def running(self) -> list[Task]:
        return [each.task for each in self.over]

    def training(self) -> list[Task]:
        return []

    def leave(self) -> None:
        pass


def swept(root: Path, *words: str) -> tuple[Plan, list[Row]]:
    """A sweep to its end, and its leaderboard."""
    made = settle(plan([*GRID, *words, f"run_root={root}"]))
    lease, story = take(made.folder.storage), made.folder.story()
    try:
        with Signals() as signals:
            assert Driver(made, story, InTurn(), lease, signals).run() == 0
    finally:
        lease.release()
    return made, ranked(made, story)


def trained(made: Plan, row: Row) -> list[int]:
    """The steps of a trial as it has done them, over all of its starts."""
    run = made.folder.run(row.trial.name)
    records = (record for number in run.attempts() for record in run.lines(number, METRICS))
    return [record["step"] for record in records if record["kind"] == "train"]


def begun_at(run: RunFolder) -> list[int]:
    """The step of the checkpoint that each start went on from."""
    return [json.loads(run.storage.read(run.attempt(number, "restored.json")))["step"] for number in run.attempts()]


def test_asha_finds_what_the_grid_finds_with_a_third_of_its_steps_and_does_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    grid, whole = swept(tmp_path, "run=grid")
    asha, rows = swept(tmp_path, "run=asha", "sweep.pruner=asha")
    steps = {row.trial.name: trained(asha, row) for row in rows}
    assert all(done == list(range(1, len(done) + 1)) for done in steps.values())
    assert sorted(len(done) for done in steps.values()) == [15] * 6 + [45] * 2 + [135]
    assert begun_at(asha.folder.run(rows[0].trial.name)) == [0, 15, 45]
    assert sum(map(len, steps.values())) == 315 < sum(len(trained(grid, row)) for row in whole) / 3
    # Stopped twice and gone on, it is the trial that the grid trained at one go, to the bit.
    (same,) = [row for row in whole if row.trial.name == rows[0].trial.name]
    assert rows[0].values == same.values
    assert whole[0].values[0] - rows[0].values[0] <= 0.005
    assert whole[0].values[0] > 0.8

"""Trials as jobs: so many in flight, one question for all, and never two jobs of one trial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_scheduler import VARIABLE, FileScheduler

from launch import cluster
from launch.job import JobHandle
from launch.schedulers.local import Signals
from launch.sweep.driver import Driver
from launch.sweep.jobs import Jobs
from launch.sweep.leaderboard import ranked
from launch.sweep.lease import take
from launch.sweep.looks import cancel
from launch.sweep.plan import Plan, load, plan, settle
from launch.sweep.workers import Task
from trainer.run_folder import Ending, Outcome, RunFolder


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileScheduler:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(cluster.CLUSTERS, "slurm", ("file_scheduler", "FileScheduler"))
    return FileScheduler()


class Nodes(Signals):
    """Between two looks of the driver the jobs get on: each round some of them end, as their trainers would."""

    def __init__(self, scheduler: FileScheduler, made: Plan) -> None:
        super().__init__()
        self.scheduler, self.made = scheduler, made
        self.in_flight: list[int] = []
        self.die_after: int | None = None

    def wait(self, seconds: float) -> None:
        known = self.scheduler.known()["jobs"]
        waiting = [number for number, job in known.items() if job["state"] == "pending"]
        self.in_flight.append(len(waiting))
        if self.die_after is not None and len(self.in_flight) > self.die_after:
            raise KeyboardInterrupt
        for number in waiting[:2]:
            self._end(number, RunFolder(known[number]["argv"][3]))

    def _end(self, number: str, folder: RunFolder) -> None:
        attempt = folder.claim({"world": 1, "began": 0.0})
        folder.storage.write(folder.attempt(attempt, "metrics.jsonl"),
                             b'{"kind": "evaluate", "step": 400, "accuracy": 0.%s}\n' % number.encode())  # fmt: skip
        folder.end(attempt, Ending(Outcome.done, 400))
        self.scheduler.set(number, state="succeeded")


def made(tmp_path: Path) -> Plan:
    return settle(plan(["job=slurm", "job.max_parallel=3", "experiment=digits", "seed=range(0,8)", "run=s",
                        f"run_root={tmp_path}"]))  # fmt: skip


def drive(made: Plan, scheduler: FileScheduler, die_after: int | None = None) -> Nodes:
    nodes, lease = Nodes(scheduler, made), take(made.folder.storage)
    nodes.die_after = die_after
    try:
        Driver(made, made.folder.story(), Jobs(made.job, FileScheduler()), lease, nodes,
               anew=made.folder.go_on()).run()  # fmt: skip
    finally:
        lease.release()
    return nodes


def jobs_of(made: Plan) -> Iterator[list[str]]:
    for trial in made.folder.story().trials:
        yield [name for name in made.folder.run(trial.name).storage.names("submissions") if "handle" in name]


def test_so_many_are_in_flight_and_all_of_them_are_one_question_a_round(
    tmp_path: Path, scheduler: FileScheduler
) -> None:
    sweep, asked = made(tmp_path), []

    class Asking(FileScheduler):
        def status(self, handles: Any) -> Any:
            if handles:
                asked.append(len(handles))
            return super().status(handles)

    nodes, lease = Nodes(scheduler, sweep), take(sweep.folder.storage)
    Driver(sweep, sweep.folder.story(), Jobs(sweep.job, Asking()), lease, nodes).run()
    lease.release()
    assert max(nodes.in_flight) == 3
    assert len(asked) == len(nodes.in_flight)
    assert max(asked) == 3
    assert [row.state for row in ranked(sweep, sweep.folder.story())] == ["done"] * 8
    assert ranked(sweep, sweep.folder.story())[0].values == (0.8,)


def test_the_next_driver_finds_the_jobs_of_the_one_before_and_makes_no_second(
    tmp_path: Path, scheduler: FileScheduler
) -> None:
    sweep = made(tmp_path)
    for rounds in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            drive(sweep, scheduler, die_after=rounds)
    drive(load(sweep.folder), scheduler)
    assert list(jobs_of(sweep)) == [["0001.handle.json"]] * 8
    assert len(scheduler.known()["jobs"]) == 8


def test_a_job_that_is_gone_is_asked_for_again_and_a_cancelled_one_is_not(
    tmp_path: Path, scheduler: FileScheduler
) -> None:
    sweep = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        drive(sweep, scheduler, die_after=0)
    scheduler.set("1", state="unknown")
    scheduler.set("2", state="cancelled")
    drive(sweep, scheduler)
    trials = sweep.folder.story().trials
    assert [trial.last.verdict.value for trial in trials if trial.last] == ["done", "cancelled"] + ["done"] * 6
    assert [len(jobs) for jobs in jobs_of(sweep)] == [2] + [1] * 7


def test_a_sweep_that_was_cancelled_goes_on_with_all_of_its_trials(tmp_path: Path, scheduler: FileScheduler) -> None:
    sweep = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        drive(sweep, scheduler, die_after=0)
    assert "3 of its trials had jobs" in cancel(sweep.folder)
    assert [job["state"] for job in scheduler.known()["jobs"].values()] == ["cancelled"] * 3
    drive(sweep, scheduler)
    assert [row.state for row in ranked(sweep, sweep.folder.story())] == ["done"] * 8


def test_a_controller_that_is_away_for_a_while_costs_a_round(tmp_path: Path, scheduler: FileScheduler) -> None:
    sweep = made(tmp_path)
    workers = Jobs(sweep.job, FileScheduler())
    values = {"seed": 1}
    workers.start([Task(0, sweep.folder.run("a"), sweep.config(values, "a", 0))])
    scheduler.keep({**scheduler.known(), "away": True})
    driver = Driver(sweep, sweep.folder.story(), workers, take(sweep.folder.storage), Signals())
    driver._collect()
    assert [task.trial for task in workers.running()] == [0]
    driver.lease.release()
    assert workers.tasks.keys() == {JobHandle("slurm", "file", "1")}


def test_a_job_of_which_only_the_intent_is_known_and_that_has_ended_is_not_made_again(
    tmp_path: Path, scheduler: FileScheduler
) -> None:
    sweep = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        drive(sweep, scheduler, die_after=0)
    first = sweep.folder.run(sweep.folder.story().trials[0].name)
    first.storage.delete("submissions/0001.handle.json")
    Nodes(scheduler, sweep)._end("1", first)
    drive(sweep, scheduler)
    assert [row.state for row in ranked(sweep, sweep.folder.story())] == ["done"] * 8
    assert len(scheduler.known()["jobs"]) == 8

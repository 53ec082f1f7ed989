"""Trials as jobs: so many in flight, one question for all, and never two jobs of one trial."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.launch.__main__ import main
from everstep.launch.config import JobConfig
from everstep.launch.job_start.signals import Signals
from everstep.launch.schedulers import registry
from everstep.launch.schedulers.job import JobHandle
from everstep.launch.sweep import start
from everstep.launch.sweep.driver import Driver
from everstep.launch.sweep.leaderboard import ranked
from everstep.launch.sweep.lease import take
from everstep.launch.sweep.plan import Plan, amended, load, plan, settle
from everstep.launch.sweep.status import cancel
from everstep.launch.sweep.workers import Task
from everstep.launch.sweep.workers_cluster import ClusterWorkers
from everstep.outcome import Ending, Outcome
from everstep.run_folder import RunFolder
from support.file_scheduler import VARIABLE, FileArrays, FileScheduler


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileScheduler:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
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
        shown = {"kind": "evaluate", "step": 400, "accuracy": float(f"0.{number.replace('_', '')}")}
        folder.storage.write(folder.attempt(attempt, "metrics.jsonl"), f"{json.dumps(shown)}\n".encode())
        folder.end(attempt, Ending(Outcome.done, 400))
        self.scheduler.set(number, state="succeeded")


def made(tmp_path: Path) -> Plan:
    return settle(plan(["job=slurm", "job.max_parallel=3", "experiment=digits", "seed=range(0,8)", "run=s",
                        f"run_root={tmp_path}"]))  # fmt: skip


def drive(made: Plan, scheduler: FileScheduler, die_after: int | None = None) -> Nodes:
    nodes, lease = Nodes(scheduler, made), take(made.folder.storage)
    nodes.die_after = die_after
    try:
        Driver(made, made.folder.story(), ClusterWorkers(made.job, FileScheduler()), lease, nodes,
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
    Driver(sweep, sweep.folder.story(), ClusterWorkers(sweep.job, Asking()), lease, nodes).run()
    lease.release()
    assert max(nodes.in_flight) == 3
    assert len(asked) == len(nodes.in_flight)
    assert max(asked) == 3
    assert [row.state for row in ranked(sweep, sweep.folder.story())] == ["done"] * 8
    assert ranked(sweep, sweep.folder.story())[0].values == (0.8,)


def test_one_trial_is_built_before_the_first_is_submitted_and_none_when_the_sweep_goes_on(
    tmp_path: Path, scheduler: FileScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str | None] = []

    def rehearse(config: RunConfig, job: JobConfig, brief: bool) -> int:
        built.append(config.run)
        return 0

    monkeypatch.setattr(start, "rehearse", rehearse)
    sweep = made(tmp_path)
    assert start._preflight(sweep, quick=True) == 0
    assert built == []
    assert start._preflight(sweep, quick=False) == 0
    drive(sweep, scheduler)
    assert start._preflight(sweep, quick=False) == 0
    assert built == [sweep.folder.story().trials[0].name]


@pytest.mark.process
def test_a_sweep_whose_trials_cannot_be_built_is_refused_and_nothing_is_written(
    tmp_path: Path, scheduler: FileScheduler, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["job=slurm", "job.nproc=1", "job.gpus=0", "experiment=digits", "model.widht=3,4", "run=s"]
    assert main(["sweep", *words, f"run_root={tmp_path}/runs"]) == 2
    assert "error: model.widht: " in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


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


def test_a_job_that_would_wait_for_long_gives_way_to_a_new_one(tmp_path: Path, scheduler: FileScheduler) -> None:
    sweep = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        drive(sweep, scheduler, die_after=0)
    scheduler.set("2", state="running", worn="pod 1: is started again only in 10 min")
    drive(sweep, scheduler)
    assert [row.state for row in ranked(sweep, sweep.folder.story())] == ["done"] * 8
    assert [len(jobs) for jobs in jobs_of(sweep)] == [1, 2] + [1] * 6
    assert scheduler.known()["jobs"]["2"]["state"] == "cancelled"


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
    workers = ClusterWorkers(sweep.job, FileScheduler())
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


@pytest.fixture
def arrays(scheduler: FileScheduler, monkeypatch: pytest.MonkeyPatch) -> FileArrays:
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileArrays"))
    return FileArrays()


def drive_arrays(made: Plan, die_after: int | None = None) -> Nodes:
    nodes, lease = Nodes(FileArrays(), made), take(made.folder.storage)
    nodes.die_after = die_after
    try:
        workers = ClusterWorkers(made.job, FileArrays(), sweep=made.folder)
        Driver(made, made.folder.story(), workers, lease, nodes, anew=made.folder.go_on()).run()
    finally:
        lease.release()
    return nodes


def sizes(arrays: FileArrays) -> list[int]:
    return [batch["size"] for batch in arrays.known().get("batches", {}).values()]


def states(made: Plan) -> list[str]:
    return [row.state for row in ranked(made, made.folder.story())]


def left_alone(tmp_path: Path) -> Plan:
    """A sweep whose driver has submitted its trials and died."""
    sweep = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        drive_arrays(sweep, die_after=0)
    return sweep


def test_all_trials_of_a_grid_are_one_batch_that_keeps_to_the_limit_by_itself(
    tmp_path: Path, arrays: FileArrays
) -> None:
    sweep = made(tmp_path)
    nodes = drive_arrays(sweep)
    assert sizes(arrays) == [8]
    assert [batch["parallel"] for batch in arrays.known()["batches"].values()] == [3]
    assert nodes.in_flight[0] == 8
    assert states(sweep) == ["done"] * 8
    assert list(jobs_of(sweep)) == [["0001.handle.json"]] * 8


def test_a_driver_that_comes_back_finds_the_batch_and_makes_no_other(tmp_path: Path, arrays: FileArrays) -> None:
    sweep = made(tmp_path)
    for rounds in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            drive_arrays(sweep, die_after=rounds)
    drive_arrays(load(sweep.folder))
    assert (sizes(arrays), states(sweep)) == ([8], ["done"] * 8)
    assert list(jobs_of(sweep)) == [["0001.handle.json"]] * 8


def test_a_driver_that_died_before_it_knew_the_batch_is_followed_by_one_that_finds_it(
    tmp_path: Path, arrays: FileArrays
) -> None:
    sweep = left_alone(tmp_path)
    for trial in sweep.folder.story().trials[2:]:
        sweep.folder.run(trial.name).storage.delete("submissions/0001.handle.json")
    drive_arrays(sweep)
    assert (sizes(arrays), states(sweep)) == ([8], ["done"] * 8)


def test_a_driver_that_is_told_another_limit_tells_it_to_what_waits_in_the_queue(
    tmp_path: Path, arrays: FileArrays
) -> None:
    sweep = left_alone(tmp_path)
    drive_arrays(settle(amended(load(sweep.folder), ["job.max_parallel=5"])))
    assert [batch["parallel"] for batch in arrays.known()["batches"].values()] == [5]


def test_a_trial_that_was_tried_again_when_its_driver_died_is_in_no_batch_beside_its_job(
    tmp_path: Path, arrays: FileArrays
) -> None:
    sweep = left_alone(tmp_path)
    arrays.set("1_0", state="unknown")
    with pytest.raises(KeyboardInterrupt):
        drive_arrays(sweep, die_after=3)
    first = sweep.folder.run(sweep.folder.story().trials[0].name)
    assert first.storage.exists("submissions/0002.handle.json")
    first.storage.delete("submissions/0002.handle.json")
    drive_arrays(sweep)
    assert (sizes(arrays), states(sweep)) == ([8], ["done"] * 8)
    assert len(arrays.known()["jobs"]) == 9


def test_more_trials_than_an_array_may_have_are_several_one_after_the_other(tmp_path: Path, arrays: FileArrays) -> None:
    sweep = made(tmp_path)
    arrays.keep({**arrays.known(), "largest": 3})
    drive_arrays(sweep)
    batches = arrays.known()["batches"]
    assert [batch["size"] for batch in batches.values()] == [3, 3, 2]
    first, second, third = ({id.partition("_")[0] for id in batch["after"]} for batch in batches.values())
    assert (first, second, third) == (set(), {"1"}, {"1", "4"})


def test_a_trial_that_is_tried_again_is_a_single_job_and_waits_for_room(tmp_path: Path, arrays: FileArrays) -> None:
    sweep = left_alone(tmp_path)
    arrays.set("1_0", state="unknown")
    nodes = drive_arrays(sweep)
    assert (sizes(arrays), states(sweep)) == ([8], ["done"] * 8)
    assert [len(jobs) for jobs in jobs_of(sweep)] == [2] + [1] * 7
    assert nodes.in_flight[:4] == [7, 5, 3, 2]


def test_where_failures_are_counted_nothing_is_queued_that_one_of_them_could_stop(
    tmp_path: Path, arrays: FileArrays
) -> None:
    words = ["job=slurm", "job.max_parallel=3", "experiment=digits", "seed=range(0,8)", "run=s",
             f"run_root={tmp_path}", "sweep.max_failures=2"]  # fmt: skip
    nodes = drive_arrays(settle(plan(words)))
    assert max(nodes.in_flight) == 3


def test_a_sampler_that_learns_is_asked_for_as_many_as_there_is_room_for(tmp_path: Path, arrays: FileArrays) -> None:
    words = ["job=slurm", "job.max_parallel=3", "experiment=digits", "sweep.sampler=tpe", "sweep.trials=8", "run=s",
             "optimizer.lr=tag(log,interval(1e-5,1e-2))", f"run_root={tmp_path}"]  # fmt: skip
    nodes = drive_arrays(settle(plan(words)))
    assert max(nodes.in_flight) == 3
    assert sizes(arrays)[0] == 3


def test_rungs_are_batches_of_what_has_earned_them(tmp_path: Path, arrays: FileArrays) -> None:
    words = ["job=slurm", "job.max_parallel=3", "experiment=digits", "seed=range(0,9)", "run=s", "steps=400",
             f"run_root={tmp_path}", "sweep.pruner=asha", "sweep.rungs=[100,400]"]  # fmt: skip
    sweep = settle(plan(words))
    nodes = drive_arrays(sweep)
    assert sizes(arrays)[0] == 9
    assert nodes.in_flight[0] == 9
    assert max(nodes.in_flight[4:]) <= 3
    assert sum(trial.rung == 1 for trial in sweep.folder.story().trials) == 3


def test_a_cluster_that_refuses_the_batch_ends_the_driver_and_no_trial(
    tmp_path: Path, arrays: FileArrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FileArrays, rendered: Any) -> JobHandle:
        raise ConfigError("sbatch refused the job: QOSMaxSubmitJobPerUserLimit")

    sweep = made(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(FileArrays, "submit", refuse)
        with pytest.raises(ConfigError, match="QOSMaxSubmitJob"):
            drive_arrays(sweep)
    drive_arrays(sweep)
    assert (sizes(arrays), states(sweep)) == ([8], ["done"] * 8)


def test_a_sweep_whose_batch_is_cancelled_goes_on_as_another(tmp_path: Path, arrays: FileArrays) -> None:
    sweep = made(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        drive_arrays(sweep, die_after=1)
    assert "6 of its trials had jobs" in cancel(sweep.folder)
    drive_arrays(sweep)
    assert (sizes(arrays), states(sweep)) == ([8, 6], ["done"] * 8)


def test_cancelling_finds_the_batch_of_a_driver_that_died_before_it_knew_it(tmp_path: Path, arrays: FileArrays) -> None:
    sweep = left_alone(tmp_path)
    for trial in sweep.folder.story().trials:
        sweep.folder.run(trial.name).storage.delete("submissions/0001.handle.json")
    cancel(sweep.folder)
    assert {job["state"] for job in arrays.known()["jobs"].values()} == {"cancelled"}

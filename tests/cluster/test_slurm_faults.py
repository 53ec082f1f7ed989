"""What can befall a job on a real Slurm: it always ends COMPLETED by itself, with the same samples and parameters.

The jobs run at the same time, each with a fault of its own in the middle, on a cluster with enough nodes for all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from everstep.outcome import Outcome
from everstep.trainer.checkpoint.manifest import candidates
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from support import ledger_toy
from support.slurm.cluster import Cluster
from support.slurm.jobs import FakeJob, Job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
MIDDLE = 110
LINGERS = ("data.pause_s=1", f"data.pause_from={MIDDLE}")
"""It gets there quickly, and is there still when at last the fault has had its effect."""
TWO_NODES = ("job.nodes=2", *LINGERS)


def undisturbed(job: Job) -> None:
    job.submit("job.nodes=2")


def power_off(job: Job) -> None:
    job.submit(*TWO_NODES)
    job.wait_for_step(MIDDLE)
    lost = job.nodes[1]
    timeline = Timeline(job)
    job.cluster.power_off(lost)
    timeline.follow_requeue()


def power_off_of_the_batch_host(job: Job) -> None:
    job.submit(*TWO_NODES)
    job.wait_for_step(MIDDLE)
    timeline = Timeline(job)
    job.cluster.power_off(job.nodes[0])
    timeline.follow_requeue()


def cut(job: Job) -> None:
    job.submit(*TWO_NODES)
    job.wait_for_step(MIDDLE)
    lost = job.nodes[1]
    timeline = Timeline(job)
    job.cluster.cut(lost)
    timeline.follow()
    # What was started there is still there, and believes itself part of the run.
    assert worker(job, lost) is not None
    job.cluster.heal(lost)


def cut_of_a_writer_that_needs_nobody(job: Job) -> None:
    """Both ranks are on the node that is cut off: they train on, and reach their next save."""
    job.submit("job.nodes=1", "job.nproc=2", *LINGERS)
    job.wait_for_step(MIDDLE)
    lost = job.nodes[0]
    job.cluster.cut(lost)
    job.until(lambda: job.step(2) > 0, "second start")
    overtaken = job.folder.attempts()[0]
    job.until(lambda: job.folder.ending(overtaken) is not None, "end of the writer that was cut off")
    job.cluster.heal(lost)


def kill_slurmd(job: Job) -> None:
    # The steps go on without it, and Slurm notices after 10 to 17 s.
    job.submit(*TWO_NODES)
    job.wait_for_step(MIDDLE)
    lost = job.nodes[1]
    timeline = Timeline(job)
    job.cluster.kill_slurmd(lost)
    job.until(lambda: job.restarts > 0, "requeue")
    job.cluster.start(lost)
    timeline.follow()


def kill_worker(job: Job) -> None:
    kill(job, f"everstep.trainer .*--frozen {job.folder.url}", "-n")


def kill_fork_server(job: Job) -> None:
    kill(job, f"everstep.trainer --fork-server .*{job.folder.url}", "-o")


def kill_agent(job: Job) -> None:
    kill(job, f"everstep.launch.node.agent .*{job.folder.url}", "-o")


def kill(job: Job, command: str, which: str) -> None:
    """Kill the oldest or newest process of that command line on the second node."""
    job.submit(*TWO_NODES)
    job.wait_for_step(MIDDLE)
    found = job.cluster.enter(job.nodes[1], "pgrep", "-f", which, command)
    timeline = Timeline(job)
    job.cluster.enter(job.nodes[1], "kill", "-KILL", found.split()[0])
    timeline.follow()


def terminate(job: Job) -> None:
    """Send the steps SIGTERM, as a preemption does where preempt_send_user_signal is not set."""
    job.submit(*TWO_NODES)
    job.wait_for_step(MIDDLE)
    timeline = Timeline(job)
    job.cluster.run("scancel", "--signal=TERM", job.id)
    timeline.follow()


def kill_controller(job: FakeJob) -> None:
    job.submit("job.nodes=1", "steps=120", env={"FAKE_TRAINER_PAUSE_S": "0.2"})  # it runs when all others are over
    # Before its state is on the disk, the controller forgets the start of a job, and ends it when it is back.
    job.until(lambda: job.step() >= 45, "step 45")
    job.cluster.kill_controller()
    reached = job.step()
    job.until(lambda: job.step() > reached + 20, "progress without a controller")
    job.cluster.start_controller()


def requeue(job: FakeJob) -> None:
    job.submit_held()
    job.cluster.run("scontrol", "requeue", job.id)


def preempt(job: FakeJob) -> None:
    job.submit_held("job.partition=spot")
    urgent = ["--partition=urgent", "--exclusive", f"--nodelist={job.nodes[0]}", "--output=/dev/null"]
    job.cluster.run("sbatch", *urgent, "--wrap=sleep 1")
    job.until(lambda: job.restarts > 0, "preemption")


def time_limit(job: FakeJob) -> None:
    """The limit is brought near in the middle of the run: Slurm counts in minutes, and a real one would take long."""
    job.submit_held()
    minutes, seconds = map(int, job.facts()["RunTime"].split(":")[-2:])
    job.cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes + (1 if seconds < 40 else 2)}")
    job.until(lambda: job.restarts > 0, "requeue")
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")


FAULTS: dict[Callable[[Job], None], list[str]] = {
    power_off: ["lost", "done"],
    power_off_of_the_batch_host: ["lost", "done"],
    cut: ["lost", "done"],
    cut_of_a_writer_that_needs_nobody: ["lost", "done"],
    kill_slurmd: ["lost", "done"],
    kill_worker: ["peer_lost", "done"],
    kill_fork_server: ["crashed", "done"],
    kill_agent: ["crashed", "done"],
    terminate: ["preempted", "done"],
}
"""Fault of a job → recorded cause of the end of each of its starts."""
OF_SLURM: dict[Callable[[FakeJob], None], list[str]] = {
    kill_controller: ["done"],
    requeue: ["lost", "done"],
    preempt: ["preempted", "done"],
    time_limit: ["preempted", "done"],
}
"""Faults that concern Slurm and the launcher only: the trainer is one without torch."""


class Timeline:
    """Progress of a job after a fault, in seconds since it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.began = time.time()
        self.marks: dict[str, float] = {}

    def follow_requeue(self) -> None:
        """Wait until a node's loss has led to a start on another."""
        job = self.job
        for what, reached in (
            ("requeued by Slurm", lambda: job.restarts > 0),
            ("waits", lambda: job.facts().get("JobState") == "PENDING"),
            ("batch script runs again", lambda: job.facts().get("JobState") == "RUNNING"),
        ):
            job.until(reached, what)
            self.marks[what] = time.time() - self.began
        self.follow()

    def follow(self) -> None:
        """Wait until the second start trains, and write the time line beside the job."""
        job = self.job
        job.until(lambda: job.step(2) > 0, "second start")
        first = min(record["time"] for record in ledger_toy.records(job.ledger, "start-0002-"))
        self.marks["trains again"] = first - self.began
        line = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.marks.items())
        (job.root / "timeline.txt").write_text(f"fault 0 s, {line}\n")


def worker(job: Job, node: str) -> int | None:
    """The process id, inside of the node, of a trainer there."""
    found = job.cluster.enter(node, "pgrep", "-f", "-n", f"everstep.trainer .*--frozen {job.folder.url}")
    return int(found.split()[0]) if found.split() else None


Fault = Callable[[Any], None]


@pytest.fixture(scope="module")
def outcomes(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[Fault, Future[Any]]]:
    """For each fault that a selected test asks for the job that goes through it; they all run at once."""
    root = tmp_path_factory.mktemp("faults")
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    every: list[Fault] = [*FAULTS, *OF_SLURM]
    asked = [fault for fault in every if any(call.params.get("fault") is fault for call in calls)]

    begun: dict[Fault, Future[Any]] = {}

    def go_through(fault: Fault) -> Job:
        if fault is kill_controller:
            # Of what was asked of it a moment before, the controller knows nothing when it is back: a fault of its own.
            wait([future for other, future in begun.items() if other is not fault])
        job = (FakeJob if fault in OF_SLURM else Job)(cluster, root, fault.__name__)
        fault(job)
        job.wait()
        return job

    with ThreadPoolExecutor(len(asked) + 1) as pool:
        for fault in sorted((undisturbed, *asked), key=lambda fault: fault is kill_controller):
            begun[fault] = pool.submit(go_through, fault)
        yield begun


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_job_survives_and_trains_on_to_the_same_parameters(outcomes: dict[Fault, Future[Job]], fault: Fault) -> None:
    job, whole = outcomes[fault].result(), outcomes[undisturbed].result()
    assert ledger_toy.slots(job.ledger) == ledger_toy.slots(whole.ledger)
    assert list(differences(locate(job.folder.url), locate(whole.folder.url))) == []
    assert job.causes() == FAULTS[fault], job.printed()


@pytest.mark.parametrize("fault", OF_SLURM, ids=lambda fault: fault.__name__)
def test_a_job_that_slurm_takes_away_or_forgets_goes_on_from_what_is_saved(
    outcomes: dict[Fault, Future[Any]], fault: Fault
) -> None:
    job = outcomes[fault].result()
    assert job.causes() == OF_SLURM[fault], job.printed()
    done = job.steps()
    assert len(done) == len(OF_SLURM[fault])
    assert [step for part in done for step in part] == list(range(1, job.folder.last_ending().step + 1))


TIMED = [power_off, power_off_of_the_batch_host, cut, kill_slurmd, kill_worker, kill_fork_server, kill_agent, terminate]


@pytest.mark.parametrize("fault", TIMED, ids=lambda fault: fault.__name__)
def test_after_a_fault_the_time_line_is_known(
    outcomes: dict[Fault, Future[Job]], fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (outcomes[fault].result().root / "timeline.txt").read_text()
    assert "trains again" in line
    with capsys.disabled():
        print(f"\n{fault.__name__}: {line}", end="")


@pytest.mark.parametrize("fault", [cut_of_a_writer_that_needs_nobody], ids=["cut_of_a_writer_that_needs_nobody"])
def test_a_writer_that_was_cut_off_commits_nothing_that_counts(
    outcomes: dict[Fault, Future[Job]], fault: Fault
) -> None:
    folder = outcomes[fault].result().folder
    ending = folder.ending(1)
    assert ending is not None
    assert ending.outcome is Outcome.superseded
    went_on_from = json.loads(folder.storage.read(folder.attempt(2, "restored.json")))["step"]
    assert all(found.attempt == 2 or found.step <= went_on_from for found in candidates(folder))

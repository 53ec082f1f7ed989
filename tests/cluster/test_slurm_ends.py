"""Starts and ends on a real Slurm that nothing has broken: clocks that differ, an agent that hangs, a run cancelled."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from everstep.launch.schedulers.slurm.jobs_json import HELD
from everstep.outcome import Outcome
from support import PATHS, TESTS
from support.slurm.cluster import Cluster
from support.slurm.jobs import Job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
LONG = ("job.nodes=2", "data.pause_s=0.2", "data.pause_from=1", "steps=100000", "job.grace_s=5")
SKEWED = os.pathsep.join([str(TESTS / "support/skewed_clock"), PATHS])


def clock_behind(job: Job) -> None:
    env = {"PYTHONPATH": SKEWED, "SKEW_S": "-10"}
    job.submit("job.nodes=2", "steps=30", f"job.env.PYTHONPATH={SKEWED}", env=env)
    job.wait()


def clock_far_ahead(job: Job) -> None:
    env = {"PYTHONPATH": SKEWED, "SKEW_S": "900"}
    job.submit("job.nodes=2", "steps=30", "job.max_restarts=0", f"job.env.PYTHONPATH={SKEWED}", env=env)
    job.until(job.is_over, "the end")


def agent_that_hangs(job: Job) -> None:
    job.submit(*LONG)
    job.wait_for_step(5)
    found = job.cluster.enter(job.nodes[1], "pgrep", "-f", "-o", f"everstep.trainer --fork-server .*{job.folder.url}")
    for pid in found.split():
        job.cluster.enter(job.nodes[1], "kill", "-STOP", pid)
    job.folder.storage.write("stop", b"enough")
    job.until(lambda: job.folder.ending(1) is not None, "outcome")
    began = time.monotonic()
    job.until(job.is_over, "the end")
    (job.root / "held_s").write_text(str(time.monotonic() - began))


def cancelled_and_resumed(job: Job) -> None:
    job.submit(*LONG, "job.nodes=1")
    job.wait_for_step(5)
    first = job.id
    job.everstep("cancel", job.name, "--root", str(job.root))
    job.everstep("resume", job.name, "plugins=[support.toy,support.ledger_toy]", "--root", str(job.root))
    (job.root / "jobs").write_text(json.dumps([first, job.id]))
    job.until(lambda: job.step(2) > 0, "step of the second job")
    job.everstep("cancel", job.name, "--root", str(job.root))


def full_folder(job: Job) -> None:
    """The run folder takes nothing when a rank is killed, and later it does again."""
    job.submit(*LONG, env={"EVERSTEP_FOLDER_WAIT_S": "3"})
    job.wait_for_step(25)
    (job.root / job.name / "restarts").mkdir()
    places = [job.root / job.name / name for name in ("starts/0001", "attempts/0001", "restarts", "checkpoints", "")]
    try:
        job.cluster.run("chattr", "+i", *map(str, places))
        found = job.cluster.enter(job.nodes[1], "pgrep", "-f", "-n", f"everstep.trainer .*--frozen {job.folder.url}")
        job.cluster.enter(job.nodes[1], "kill", "-KILL", found.split()[0])
        job.until(lambda: job.facts().get("Reason", "").startswith(HELD), "hold")
        (job.root / "shown").write_text(job.everstep("status", job.name, "--root", str(job.root)))
    finally:
        job.cluster.run("chattr", "-i", *map(str, places))
    job.cluster.run("scontrol", "release", job.id)
    # A late signal for the old step 0 may still end the new one, which has the same number; then it is the third start.
    job.until(lambda: any(job.step(start) > 0 for start in (2, 3)), "step after the release")
    job.everstep("cancel", job.name, "--root", str(job.root))


CASES = (clock_behind, clock_far_ahead, agent_that_hangs, cancelled_and_resumed, full_folder)


@pytest.fixture(scope="module")
def ended(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[Callable[[Job], None]], Job]]:
    """Goes through the cases that were selected, all at once; gives the job of one when that is over."""
    asked = [case for case in CASES if any(case.__name__ in item.name for item in request.session.items)]

    roots = {case: tmp_path_factory.mktemp(case.__name__) for case in asked}  # not made by many threads at once

    def go(case: Callable[[Job], None]) -> Job:
        job = Job(cluster, roots[case], case.__name__)
        case(job)
        return job

    with ThreadPoolExecutor(len(CASES)) as pool:
        begun: dict[Callable[[Job], None], Future[Job]] = {case: pool.submit(go, case) for case in asked}
        yield lambda case: begun[case].result()


def test_clock_behind_by_seconds_is_told_and_all_nodes_train(ended: Callable[..., Job]) -> None:
    job = ended(clock_behind)
    assert job.folder.claim_of(1)["world"] == 2
    assert "its clock is 10 s behind that of" in job.printed()
    assert "fix NTP" in job.printed()


def test_clock_far_ahead_keeps_a_node_out_and_no_half_of_the_job_trains(ended: Callable[..., Job]) -> None:
    job = ended(clock_far_ahead)
    assert job.facts()["JobState"] == "FAILED"
    assert job.folder.attempts() == []
    assert "its clock is 900 s ahead of that of" in job.printed()


def test_agent_that_hangs_does_not_hold_the_nodes(ended: Callable[..., Job]) -> None:
    job = ended(agent_that_hangs)
    ending = job.folder.ending(1)
    assert ending is not None
    assert ending.outcome is Outcome.preempted
    assert float((job.root / "held_s").read_text()) < 60, job.printed()


def test_cancelled_and_resumed_at_once_goes_on_in_a_new_job(ended: Callable[..., Job]) -> None:
    job = ended(cancelled_and_resumed)
    first, second = json.loads((job.root / "jobs").read_text())
    assert first != second
    assert job.folder.attempts()[:2] == [1, 2]


def test_full_folder_holds_the_job_until_there_is_room(ended: Callable[..., Job]) -> None:
    job = ended(full_folder)
    assert "scontrol release" in (job.root / "shown").read_text()
    assert job.folder.attempts()[:2] == [1, 2]

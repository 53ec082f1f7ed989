"""A run becomes one job, whenever its launcher dies and however many there are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Ask, Program, Rendered
from everstep.launch.schedulers.job import CANCELLED, JobHandle, JobState, JobStatus, new_token
from everstep.launch.submit.submission import Receipt, submissions, submit
from everstep.run_folder import RunFolder


class Killed(BaseException):
    """The launcher dies."""


@dataclass
class Cluster:
    """A scheduler in memory. `die` says where the launcher is killed, `lose` whether answers of sbatch get lost."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    die: str = ""
    refuse: bool = False
    lose: bool = False
    worn: str = ""
    """The job that would wait for long."""

    def render(self, job: JobConfig, program: Program) -> Rendered:
        return Rendered(("sbatch", program.token))

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        return []

    def submit(self, rendered: Rendered) -> JobHandle:
        if self.refuse:
            raise ConfigError("sbatch refused the job: no such partition")
        if self.die == "before":
            raise Killed
        number = str(len(self.jobs) + 1)
        self.jobs[number], self.tokens[rendered.argv[1]] = JobState.pending, number
        if self.die == "after":
            raise Killed
        if self.lose:
            raise ConfigError("sbatch refused the job: Socket timed out")
        return JobHandle("slurm", "c", number)

    def find(self, token: str) -> JobHandle | None:
        return JobHandle("slurm", "c", self.tokens[token]) if token in self.tokens else None

    def status(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        tokens = {number: token for token, number in self.tokens.items()}
        return {
            handle: JobStatus(
                self.jobs.get(handle.id, JobState.unknown),
                token=tokens.get(handle.id, ""),
                worn="waits" * (handle.id == self.worn),
            )
            for handle in handles
        }

    def follow(self) -> AbstractContextManager[Ask]:
        return nullcontext(self.status)

    def cancel(self, handles: Sequence[JobHandle]) -> None:
        for handle in handles:
            self.jobs[handle.id] = JobState.cancelled


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def submitted(folder: RunFolder, cluster: Cluster, token: str = "first") -> Receipt:
    token = f"{token}-{new_token(folder.url).rpartition('-')[2]}"
    program = Program("run", folder.url, ("-m", "everstep.trainer", "--frozen", folder.url), token)
    return submit(folder, JobConfig(scheduler="slurm"), program, cluster)


def leave_no_launcher(folder: RunFolder, number: int = 1) -> None:
    """The intent is of a process that is gone."""
    path = Path(folder.url, f"submissions/{number:04d}.json")
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": pid}))


def test_a_run_that_waits_or_runs_is_named_and_not_submitted_again(folder: RunFolder) -> None:
    cluster = Cluster()
    assert submitted(folder, cluster).is_new
    again = submitted(folder, cluster, "second")
    assert (again.is_new, again.handle.id, len(cluster.jobs)) == (False, "1", 1)
    assert again.status is not None
    assert again.status.state is JobState.pending


@pytest.mark.parametrize("state", [JobState.succeeded, JobState.failed, JobState.cancelled, JobState.preempted])
def test_a_run_whose_job_is_over_gets_another(folder: RunFolder, state: JobState) -> None:
    cluster = Cluster()
    submitted(folder, cluster)
    cluster.jobs["1"] = state
    assert submitted(folder, cluster, "second").handle.id == "2"


def test_a_job_that_the_scheduler_has_forgotten_is_over(folder: RunFolder) -> None:
    cluster = Cluster()
    submitted(folder, cluster)
    assert submitted(folder, Cluster(), "second").is_new


def test_a_launcher_that_dies_before_the_job_is_made_is_followed_by_one_job(folder: RunFolder) -> None:
    cluster = Cluster(die="before")
    with pytest.raises(Killed):
        submitted(folder, cluster)
    leave_no_launcher(folder)
    cluster.die = ""
    assert submitted(folder, cluster, "second").is_new
    assert len(cluster.jobs) == 1


def test_a_launcher_that_dies_after_the_job_is_made_is_followed_by_no_other(folder: RunFolder) -> None:
    cluster = Cluster(die="after")
    with pytest.raises(Killed):
        submitted(folder, cluster)
    leave_no_launcher(folder)
    cluster.die = ""
    found = submitted(folder, cluster, "second")
    assert (found.is_new, found.handle.id, len(cluster.jobs)) == (False, "1", 1)


def test_a_launcher_that_still_lives_is_waited_for(folder: RunFolder) -> None:
    cluster = Cluster(die="before")
    with pytest.raises(Killed):
        submitted(folder, cluster)
    path = Path(folder.url, "submissions/0001.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getppid()}))
    with pytest.raises(ConfigError, match=f"is being submitted by process {os.getppid()} on "):
        submitted(folder, cluster, "second")


def test_an_answer_that_got_lost_is_looked_for(folder: RunFolder) -> None:
    cluster = Cluster(lose=True)
    assert submitted(folder, cluster).handle.id == "1"
    assert not submitted(folder, cluster, "second").is_new


def test_a_refusal_leaves_the_way_free(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="no such partition"):
        submitted(folder, Cluster(refuse=True))
    assert [found.is_settled for found in submissions(folder)] == [True]
    assert submitted(folder, Cluster(), "second").is_new


def test_of_many_launchers_at_once_one_makes_a_job(folder: RunFolder) -> None:
    cluster = Cluster()

    def launch(number: int) -> bool:
        try:
            return submitted(folder, cluster, f"token-{number}").is_new
        except ConfigError:
            return False

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(launch, range(8)))
    assert (sum(made), len(cluster.jobs)) == (1, 1)


def test_a_launcher_that_was_taken_for_dead_cancels_its_own_job(folder: RunFolder) -> None:
    cluster = Cluster()

    class Slow(Cluster):
        def submit(self, rendered: Rendered) -> JobHandle:
            submissions(folder)[-1].settle(None)  # another launcher has given this intent up
            return cluster.submit(rendered)

        def cancel(self, handles: Sequence[JobHandle]) -> None:
            cluster.cancel(handles)

    with pytest.raises(ConfigError, match="was cancelled"):
        submitted(folder, Slow())
    assert cluster.jobs == {"1": JobState.cancelled}


@pytest.mark.parametrize("die", ["", "before", "after"])
def test_a_job_that_would_wait_for_long_gives_way_to_one_new_job_whenever_the_launcher_dies(
    folder: RunFolder, die: str
) -> None:
    cluster = Cluster()
    submitted(folder, cluster)
    cluster.worn, cluster.die = "1", die
    if die:
        with pytest.raises(Killed):
            submitted(folder, cluster, "second")
        leave_no_launcher(folder, 2)
        cluster.die = ""
    receipt = submitted(folder, cluster, "third")
    alive = [number for number, state in cluster.jobs.items() if not state.is_over]
    assert (cluster.jobs["1"], [receipt.handle.id]) == (JobState.cancelled, alive)
    assert folder.facts("restarts/0001.json")["reason"] == "waits; a new job takes the place of slurm://c/1"


@pytest.mark.parametrize("ending", [True, False])
def test_a_job_that_ends_is_waited_for_and_the_run_gets_another(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, ending: bool
) -> None:
    """The scheduler says that it still clears its nodes, or only the run folder that somebody has cancelled it."""
    monkeypatch.setattr("everstep.launch.submit.submission.LOOK_S", 0.01)
    cluster, looks = Cluster(), iter(range(3))
    submitted(folder, cluster)
    if not ending:
        folder.record_restart({"outcome": CANCELLED, "go_on": False, "reason": "cancelled by me", "restarts": 0})

    def status(handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        here = next(looks, None) is not None
        state = JobState.running if here else JobState.cancelled
        return {handle: JobStatus(state, ending=ending and here) for handle in handles}

    monkeypatch.setattr(cluster, "status", status)
    assert submitted(folder, cluster, "second").handle.id == "2"


def test_a_job_that_never_ends_is_named(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.launch.submit.submission.ENDING_S", 0.0)
    cluster = Cluster()
    submitted(folder, cluster)
    folder.record_restart({"outcome": CANCELLED, "go_on": False, "reason": "cancelled by me", "restarts": 0})
    with pytest.raises(ConfigError, match="job slurm://c/1 has been ending for"):
        submitted(folder, cluster, "second")

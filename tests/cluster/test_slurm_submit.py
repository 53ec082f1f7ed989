"""Submitting to a real Slurm: once, with secrets kept, by hand too, around bad nodes and with fewer nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from everstep.launch.schedulers.job import JobHandle, JobState
from everstep.launch.schedulers.slurm.sbatch import script
from everstep.launch.schedulers.slurm.scheduler import Slurm
from support import PATHS, TESTS, ledger_toy
from support.slurm.cluster import Cluster
from support.slurm.jobs import Job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
SECRET = "plänted-7f3a-value"
SHORT = ("job.nodes=2", "steps=30")
OTHERS = ["job=slurm", "job.nproc=1", "job.gpus=0", "job.flags=[--exclusive]"]


def another_program(job: Job) -> None:
    words = [*OTHERS, "job.nodes=2", "job.secrets=[PLANTED_SECRET]", f"run={job.name}", f"run_root={job.root}"]
    job.everstep(
        "submit", *words, "--", str(TESTS / "support/foreign_script.py"), "--lr", "1", env={"PLANTED_SECRET": SECRET}
    )
    job.wait()


def by_hand(job: Job) -> None:
    """Submitted once and cancelled; then the script is given to sbatch without the launcher."""
    job.submit(*SHORT, "job.flags=[--hold]", quick=False)
    job.cluster.run("scancel", job.id)
    out = f"--output={job.folder.url}/slurm-by-hand.out"
    hand = ["sbatch", "--parsable", "--nodes=2", "--exclusive", out, str(script()), job.folder.url]
    number = job.cluster.run(*hand, "--python", sys.executable).strip()
    job.until(lambda: job.cluster.output("squeue", "-h", "-j", number) == "", "the end")


def inside_of_salloc(job: Job) -> None:
    job.submit("job.nodes=1", "steps=30", "job.flags=[--hold]")
    job.cluster.run("scancel", job.id)
    command = ["salloc", "--nodes=1", "--exclusive", "bash", str(script()), job.folder.url, "--python", sys.executable]
    done = subprocess.run(command, env={**job.cluster.env, "PYTHONPATH": PATHS}, capture_output=True, text=True,
                          timeout=200, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def mistake_of_the_user(job: Job) -> None:
    """The plug-in is not where the job looks for it."""
    job.submit("job.nodes=2", "job.env.PYTHONPATH=/nowhere")
    job.until(job.is_over, "the end")


def crash_after_crash(job: Job) -> None:
    words = [*OTHERS, "job.max_restarts=1", f"run={job.name}", f"run_root={job.root}"]
    (job.root / "crash.py").write_text("raise SystemExit(7)\n")
    job.everstep("submit", *words, "--", str(job.root / "crash.py"))
    job.until(job.is_over, "the end")


def bad_node_and_then_fewer(job: Job) -> None:
    """Of the three nodes apart the first maps its own name to itself; the job leaves it out. Then one is lost."""
    bad = job.cluster.names[-3]
    hosts = job.root / "hosts"
    known = (job.cluster.state / "hosts").read_text()
    hosts.write_text(known.replace(f"{job.cluster.address(bad)} {bad}\n", f"127.0.1.1 {bad}\n"))
    job.cluster.enter(bad, "mount", "--bind", str(hosts), "/etc/hosts")
    job.submit("job.nodes=1:2", "job.partition=apart", "data.pause_s=0.1", "steps=150")
    job.wait_for_step(40)
    job.cluster.power_off(job.nodes[1])
    job.wait()


def edited_while_it_was_queued(job: Job) -> None:
    """A program in a folder of its own, changed between the submission and the start."""
    folder = job.root / "project"
    folder.mkdir()
    (folder / "program.py").write_text("import helper; print('it says', helper.WORD)")
    (folder / "helper.py").write_text("WORD = 'as submitted'")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    words = [*OTHERS, "job.flags=[--exclusive,--hold]", f"run={job.name}", f"run_root={job.root}"]
    job.everstep("submit", *words, "--", "program.py", where=folder)
    (folder / "helper.py").write_text("WORD = 'as edited'")
    (folder / "program.py").write_text("print('edited')")
    job.cluster.run("scontrol", "release", job.id)
    job.wait()


SCENARIOS = (
    edited_while_it_was_queued,
    another_program,
    by_hand,
    inside_of_salloc,
    mistake_of_the_user,
    crash_after_crash,
    bad_node_and_then_fewer,
)
Scenario = Callable[[Job], None]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Scenario, Future[Job]]]:
    """The job of each scenario; they all run at once."""
    root = tmp_path_factory.mktemp("submit")

    def play(scenario: Scenario) -> Job:
        job = Job(cluster, root, scenario.__name__)
        scenario(job)
        return job

    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {scenario: pool.submit(play, scenario) for scenario in SCENARIOS}


def test_any_script_of_torchruns_runs_on_all_nodes(jobs: dict[Scenario, Future[Job]]) -> None:
    job = jobs[another_program].result()
    assert job.printed().count(f"['--lr', '1'] sum 3.0 of 2, secret of {len(SECRET)} letters") == 2
    assert job.causes() == ["done"]


def test_what_is_queued_is_not_touched_by_later_edits(jobs: dict[Scenario, Future[Job]]) -> None:
    job = jobs[edited_while_it_was_queued].result()
    assert "it says as submitted" in job.printed()
    assert "edited" not in job.printed().replace("edited_while", "")


def test_a_secret_reaches_the_processes_and_is_written_nowhere(jobs: dict[Scenario, Future[Job]]) -> None:
    job = jobs[another_program].result()
    written = [file for file in Path(job.folder.url).rglob("*") if file.is_file()]
    assert len(written) > 5
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in job.cluster.run("scontrol", "show", "job", "-dd", job.id)
    assert SECRET not in job.cluster.run("scontrol", "write", "batch_script", job.id, "-")


@pytest.mark.parametrize("scenario", [by_hand, inside_of_salloc], ids=lambda scenario: scenario.__name__)
def test_the_same_script_runs_without_the_launcher(jobs: dict[Scenario, Future[Job]], scenario: Scenario) -> None:
    ending = jobs[scenario].result().folder.last_ending()
    assert ending is not None
    assert (ending.outcome.value, ending.step) == ("done", 30)


def test_a_mistake_of_the_user_ends_the_job_at_once(jobs: dict[Scenario, Future[Job]]) -> None:
    job = jobs[mistake_of_the_user].result()
    assert (job.causes(), job.restarts, job.facts()["ExitCode"]) == (["user_error"], 0, "2:0"), job.printed()


def test_a_program_that_always_fails_is_given_up(jobs: dict[Scenario, Future[Job]]) -> None:
    job = jobs[crash_after_crash].result()
    assert (job.causes(), job.facts()["JobState"]) == (["crashed", "no_progress"], "FAILED"), job.printed()
    assert "exit code 7" in job.printed()


def test_a_bad_node_is_left_out_and_a_job_of_one_or_two_nodes_goes_on_with_one(
    jobs: dict[Scenario, Future[Job]],
) -> None:
    job = jobs[bad_node_and_then_fewer].result()
    assert job.causes() == ["bad_node", "lost", "done"], job.printed()
    hosts = [json.loads(file.read_text())["hosts"] for file in sorted(Path(job.folder.url).glob("starts/*/start.json"))]
    bad, *good = job.cluster.names[-3:]
    assert bad in hosts[0]
    assert [hosts[1], len(hosts[2])] == [good, 1]


@pytest.fixture
def held(cluster: Cluster, tmp_path: Path) -> Iterator[Job]:
    """A run whose job waits for nothing but a user."""
    job = Job(cluster, tmp_path, "held")
    yield job
    cluster.output("scancel", "--name=held")


HOLD = "job.flags=[--hold]"


def waiting(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "-h", "--name=held", "-o", "%i").split()


def test_two_submissions_of_one_run_make_one_job(held: Job) -> None:
    held.submit(HOLD, quick=False)
    said = held.submit(HOLD, quick=False)
    # The second time nothing is built: that would be in vain.
    assert (held.ledger / ledger_toy.LOOKS).read_text() == "41 samples\n"
    assert waiting(held.cluster) == [held.id]
    assert f"already submitted as slurm://everstep{held.cluster.id}/{held.id} (pending" in said


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_launcher_that_is_killed_around_sbatch_leaves_one_job_after_the_next(
    held: Job, tmp_path: Path, moment: str
) -> None:
    deadly = tmp_path / "bin/sbatch"
    deadly.parent.mkdir()
    real = '/usr/bin/sbatch "$@"'
    # `check` asks sbatch too, and may live.
    deadly.write_text(f'#!/bin/sh\ncase "$*" in *--test-only*) exec {real};; esac\n'
                      f'{real if moment == "after" else ""}\nkill -KILL $PPID\n')  # fmt: skip
    deadly.chmod(0o755)
    with pytest.raises(RuntimeError, match="exit code -9"):
        held.submit(HOLD, env={"PATH": f"{deadly.parent}:{held.cluster.env['PATH']}"})
    there = waiting(held.cluster)
    assert len(there) == (1 if moment == "after" else 0)
    held.submit(HOLD)
    assert waiting(held.cluster) == [held.id]
    assert there in ([], [held.id])


@pytest.mark.parametrize(("words", "said"), [
    (["job.partition=absent"], "absent"),
    (["job.nodes=99"], "job.nodes=99"),
    (["job.gpus=1"], "job.gpus=1: nodes of partition main have at most 0 GPUs; change job.gpus"),
    (["job.gpus=auto", "job.nproc=4"], "job.gpus=4 (as many as job.nproc): nodes of partition main have at most 0"),
    (["job.cpus=3"], "job.cpus=3: nodes of partition main have at most 2 CPUs; change job.cpus"),
])  # fmt: skip
def test_what_the_cluster_cannot_do_is_refused_before_it_is_queued(held: Job, words: list[str], said: str) -> None:
    with pytest.raises(RuntimeError, match="exit code 2") as error:
        held.submit(HOLD, *words)
    assert said in str(error.value)
    assert waiting(held.cluster) == []
    assert not Path(held.folder.url).exists()


@pytest.mark.parametrize(("words", "said"), [
    (["job.nodes=1:3", "parallel=fsdp", "task._target_=support.ledger_toy.PairTask"],
     "model: ValueError: 3 processes, and"),
    (["task.widht=3"], "task.widht: "),
    (["data.samples=0"], "data: "),
])  # fmt: skip
def test_what_cannot_be_built_is_refused_before_it_is_queued(held: Job, words: list[str], said: str) -> None:
    with pytest.raises(RuntimeError, match="exit code 2") as error:
        held.submit(HOLD, *words, quick=False)
    assert f"error: {said}" in str(error.value)
    assert waiting(held.cluster) == []
    assert not Path(held.folder.url).exists()


def test_questions_survive_a_controller_that_is_down_for_a_while(held: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    held.submit(HOLD)
    for name, value in held.cluster.env.items():
        monkeypatch.setenv(name, value)
    handle = JobHandle("slurm", f"everstep{held.cluster.id}", held.id)
    token = json.loads((Path(held.folder.url) / "submissions/0001.json").read_text())["token"]
    # What was accepted a moment before the controller is killed may be lost with it.
    saved = held.cluster.state / "state/job_state"
    held.until(lambda: saved.exists() and token.encode() in saved.read_bytes(), "saved state")
    held.cluster.kill_controller()
    repair = threading.Timer(2.0, held.cluster.start_controller)
    repair.start()
    try:
        assert Slurm().find(token) == handle
        stranger = JobHandle("slurm", handle.cluster, "4711")
        statuses = Slurm().status([handle, stranger])
        assert [statuses[handle].state, statuses[stranger].state] == [JobState.pending, JobState.unknown]
    finally:
        repair.join()


def test_cancelled_is_cancelled_and_may_be_said_twice(held: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    held.submit(HOLD)
    for name, value in held.cluster.env.items():
        monkeypatch.setenv(name, value)
    handle = JobHandle("slurm", f"everstep{held.cluster.id}", held.id)
    for _ in range(2):
        Slurm().cancel([handle, JobHandle("slurm", handle.cluster, "4711")])
    assert Slurm().status([handle])[handle].state is JobState.cancelled

"""What Slurm's commands say, read as one status for old and new versions.

The sample of 22.05 was recorded. That of 23.11 says the same jobs in the form that its documentation describes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.errors import ConfigError
from everstep.launch.job_start.allocation import expand
from everstep.launch.schedulers.job import JobState
from everstep.launch.schedulers.slurm.jobs_json import accounted, jobs

SAMPLES = Path(__file__).parent.parent / "samples"
OLD, NEW = ((SAMPLES / f"squeue_{version}.json").read_text() for version in ("22_05", "23_11"))


@pytest.mark.parametrize("text", [OLD, NEW], ids=["22.05", "23.11"])
def test_old_and_new_slurm_say_the_same_of_the_same_jobs(text: str) -> None:
    found = {job.id: job for job in jobs(text)}
    failed, running, waiting = found["1"], found["3"], found["5"]
    assert (failed.comment, failed.cluster) == ("everstep-aa", "everstep6")
    assert (failed.status.state, failed.status.exit_code, failed.status.nodes) == (JobState.failed, 3, ("n1", "n2"))
    assert failed.status.reason == "NonZeroExitCode"
    assert (running.status.state, running.status.nodes) == (JobState.running, ("n1", "n2", "n3"))
    assert (running.status.ended_at, running.status.exit_code, running.status.reason) == (None, None, "")
    assert (waiting.status.state, waiting.status.reason, waiting.status.started_at) == (
        JobState.pending, "Resources", None)  # fmt: skip
    assert waiting.status.submitted_at == 1795574136.0


@pytest.mark.parametrize("text", [OLD, NEW], ids=["22.05", "23.11"])
def test_tasks_of_an_array_are_told_apart_though_the_last_one_has_the_arrays_own_number(text: str) -> None:
    array = {job.id for job in jobs(text) if job.comment == "everstep-arr"}
    assert array == {"2_0", "2_1"}


def test_flags_beside_the_state_are_understood() -> None:
    found = {job.comment: job.status for job in jobs(NEW)}
    assert found["everstep-going"].state is JobState.running
    assert found["everstep-again"].state is JobState.pending
    assert found["everstep-killed"].exit_code == 137


def test_an_answer_that_is_none_is_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        jobs("slurm_load_jobs error: Unable to contact slurm controller")


@pytest.mark.parametrize(
    ("row", "state", "code"),
    [
        ("12|COMPLETED|0:0|n[1-2]|2026-11-25T02:00:00|2026-11-25T02:00:10|2026-11-25T02:10:00", JobState.succeeded, 0),
        ("12|CANCELLED by 1000|0:15|n1|2026-11-25T02:00:00|Unknown|2026-11-25T02:10:00", JobState.cancelled, 143),
        ("12|NODE_FAIL|1:0|None assigned|2026-11-25T02:00:00|None|Unknown", JobState.failed, 1),
        ("12|SOMETHING_NEW|0:0||Unknown|Unknown|Unknown", JobState.unknown, 0),
    ],
)
def test_lines_of_accounting_are_read(row: str, state: JobState, code: int) -> None:
    number, status = accounted(row)
    assert (number, status.state, status.exit_code) == ("12", state, code)
    assert status.started_at is None or status.started_at > 1e9


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ("n1",)),
        ("n[1-3]", ("n1", "n2", "n3")),
        ("n[1-2,5],login", ("n1", "n2", "n5", "login")),
        ("gpu[08-10]-ib", ("gpu08-ib", "gpu09-ib", "gpu10-ib")),
        ("r[1-2]n[1,3]", ("r1n1", "r1n3", "r2n1", "r2n3")),
        ("", ()),
    ],
)
def test_host_lists_are_written_out(text: str, names: tuple[str, ...]) -> None:
    assert expand(text) == names

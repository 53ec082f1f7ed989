"""What state a run is said to be in, and why."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from typing import Any

import pytest

from everstep.launch.runs.history import Attempt, History, Submission, alive, has_process
from everstep.launch.runs.state import RunState, standing
from everstep.launch.schedulers.job import JobHandle, JobState, JobStatus
from everstep.outcome import Ending, Outcome

NOW = 10_000.0
HANDLE = JobHandle("slurm", "c", "7")


def attempt(at: float = NOW - 100, ending: Ending | None = None, **more: Any) -> Attempt:
    return Attempt(1, at, at, ending=ending, **{"host": "elsewhere", "pid": 1, **more})


def history(*attempts: Attempt, **more: Any) -> History:
    return History("r", "runs/r", attempts, **more)


def submitted(*attempts: Attempt, at: float = NOW - 200, **more: Any) -> History:
    return history(*attempts, submissions=(Submission(1, at, "slurm", HANDLE, True),), **more)


def decided(go_on: bool, ago_s: float = 1, reason: str = "because", **more: Any) -> dict[str, Any]:
    return {"go_on": go_on, "time": NOW - ago_s, "reason": reason, **more}


def state(history: History, job: JobStatus | None = None, alive: bool | None = False) -> RunState:
    return standing(history, job, alive, NOW).state


def ended(outcome: str) -> Ending:
    return Ending(Outcome(outcome), 5, "why")


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [("done", "done"), ("preempted", "stopped"), ("crashed", "failed"), ("diverged", "failed"),
     ("config_error", "failed"), ("out_of_memory", "failed"), ("superseded", "failed"),
     ("stalled", "failed")],
)  # fmt: skip
def test_the_word_of_the_last_attempt_counts(outcome: str, expected: str) -> None:
    assert state(history(attempt(ending=ended(outcome)))).value == expected


def test_a_run_here_lives_or_is_lost() -> None:
    progress = {"time": NOW - 1}
    assert state(history(attempt()), alive=True) is RunState.starting
    assert state(history(attempt(), progress=progress), alive=True) is RunState.training
    assert state(history(attempt(), progress=progress), alive=False) is RunState.lost
    assert state(history(attempt(), progress=progress), alive=None) is RunState.silent


def test_progress_of_an_earlier_attempt_is_no_training() -> None:
    assert state(history(attempt(), progress={"time": NOW - 500}), alive=True) is RunState.starting


def test_between_two_attempts_a_run_is_restarting_for_a_while() -> None:
    crashed = attempt(ending=ended("crashed"))
    assert state(history(crashed, decisions=(decided(True),))) is RunState.restarting
    assert state(history(attempt(NOW - 900, ended("crashed")), decisions=(decided(True, 600),))) is RunState.failed
    found = standing(history(crashed, decisions=(decided(False, reason="no other start"),)), None, False, NOW)
    assert (found.state, found.why) == (RunState.failed, "no other start")


def test_a_job_that_waits_says_why() -> None:
    found = standing(submitted(), JobStatus(JobState.pending, "Resources"), False, NOW)
    assert (found.state, found.why) == (RunState.queued, "Resources")


def test_a_requeued_job_is_queued_whatever_its_attempts_said() -> None:
    crashed = submitted(attempt(ending=ended("crashed")))
    assert state(crashed, JobStatus(JobState.pending, "BeginTime")) is RunState.queued


def test_a_job_that_runs_is_starting_until_an_attempt_of_this_start_has_progress() -> None:
    running = JobStatus(JobState.running, started_at=NOW - 50)
    assert state(submitted(), running) is RunState.starting
    assert state(submitted(attempt(NOW - 100)), running) is RunState.starting
    assert state(submitted(attempt(NOW - 40)), running) is RunState.starting
    assert state(submitted(attempt(NOW - 40), progress={"time": NOW - 1}), running) is RunState.training
    assert state(submitted(attempt(NOW - 40, ended("crashed"))), running) is RunState.restarting


@pytest.mark.parametrize(
    ("job", "expected"),
    [("failed", "failed"), ("cancelled", "cancelled"), ("preempted", "stopped"), ("succeeded", "lost")],
)
def test_a_job_that_ended_without_a_word_of_its_run(job: str, expected: str) -> None:
    assert state(submitted(), JobStatus(JobState(job), "why")).value == expected
    assert state(submitted(attempt()), JobStatus(JobState(job), "why")).value == expected


def test_what_the_run_itself_said_counts_more_than_the_job() -> None:
    assert state(submitted(attempt(ending=ended("done"))), JobStatus(JobState.failed)) is RunState.done
    assert state(submitted(attempt(ending=ended("preempted"))), JobStatus(JobState.succeeded)) is RunState.stopped


def test_a_job_that_is_forgotten_is_told_from_the_folder() -> None:
    forgotten = JobStatus(JobState.unknown)
    assert state(submitted(attempt(ending=ended("done"))), forgotten) is RunState.done
    assert state(submitted(attempt()), forgotten, alive=None) is RunState.silent
    assert state(submitted(), forgotten) is RunState.lost


def test_a_controller_that_is_away_makes_no_run_lost() -> None:
    away = JobStatus(JobState.unknown, "the controller does not answer")
    found = standing(submitted(), away, False, NOW)
    assert (found.state, found.why) == (RunState.silent, "the controller does not answer")
    assert state(submitted(attempt(), progress={"time": NOW - 1}), away, alive=True) is RunState.training


def test_an_intent_without_a_job_is_queued_until_it_is_known_that_there_is_none() -> None:
    pending = history(submissions=(Submission(1, NOW - 5, "slurm"),))
    assert state(pending) is RunState.queued
    none = (Submission(1, NOW - 5, "slurm", None, True),)
    assert state(history(submissions=none)) is RunState.new
    assert state(history(attempt(ending=ended("preempted")), submissions=none)) is RunState.stopped


def test_a_cancelled_run_stays_so_until_it_is_asked_for_again() -> None:
    cancelled = (decided(False, 10, "by me", outcome="cancelled"),)
    assert state(submitted(attempt(), decisions=cancelled)) is RunState.cancelled
    ending = submitted(attempt(ending=ended("preempted")), decisions=cancelled)
    assert state(ending, JobStatus(JobState.running, started_at=NOW - 150)) is RunState.cancelled
    assert state(submitted(decisions=cancelled, at=NOW - 5), JobStatus(JobState.failed)) is RunState.failed
    assert state(history(submissions=(Submission(1, NOW - 50, "slurm"),), decisions=cancelled)) is RunState.cancelled


def test_a_folder_with_nothing_in_it_but_a_config_is_new() -> None:
    assert state(history()) is RunState.new


def test_over_is_what_only_resume_changes() -> None:
    over = {each.value for each in RunState if each.is_over}
    assert over == {"done", "stopped", "cancelled", "failed", "lost"}


def test_a_process_lives_only_if_it_is_the_one_that_claimed() -> None:
    mine = attempt(time.time(), host=socket.gethostname(), pid=os.getpid())
    assert has_process(mine)
    # A number that was given to another process since: that one began after the claim.
    assert not has_process(dataclasses.replace(mine, claimed_at=1.0))
    assert not has_process(dataclasses.replace(mine, pid=2**22 - 1))


def test_on_another_machine_a_run_lives_as_long_as_it_gives_signs() -> None:
    def seen(ago_s: float, **more: float) -> bool | None:
        return alive(history(attempt(NOW - 5000), progress={"time": NOW - ago_s, **more}), NOW)

    assert seen(60) is True
    assert seen(600) is None
    assert seen(600, next_s=200.0) is True
    assert alive(history(attempt(NOW - 300)), NOW) is True
    assert alive(history(attempt(NOW - 3000)), NOW) is None
    assert alive(history(), NOW) is False


@pytest.mark.parametrize("job", [None, JobStatus(JobState.succeeded), JobStatus(JobState.unknown)])
def test_another_program_that_claims_nothing_is_what_was_decided_of_it(job: JobStatus | None) -> None:
    done = decided(go_on=False, outcome="done")
    assert state(submitted(decisions=(done,)), job) is RunState.done
    assert state(submitted(decisions=(decided(go_on=False, outcome="crashed"),)), job) is RunState.failed
    assert state(submitted(at=NOW, decisions=(done,)), JobStatus(JobState.pending)) is RunState.queued

"""The restart policy, case by case."""

from __future__ import annotations

import dataclasses

import pytest

from everstep.launch.restart.local_policy import back_off_s, decide
from everstep.outcome import Ending, Fault, Outcome


@pytest.mark.parametrize("outcome", ["done", "preempted", "config_error", "diverged", "superseded"])
def test_an_ending_that_a_restart_would_not_change_is_the_last(outcome: str) -> None:
    decision = decide(Ending(Outcome(outcome), step=7, reason="why"), restarts=0, max_restarts=3, progressed=True)
    assert not decision.go_on
    assert "step 7" in decision.reason
    # The trainer has told these in full already.
    assert ("why" in decision.reason) == (outcome not in ("config_error", "diverged"))


def test_every_outcome_has_a_decision() -> None:
    for outcome in Outcome:
        assert decide(Ending(outcome), restarts=0, max_restarts=1, progressed=False).reason


def test_a_crash_starts_again_while_there_is_budget() -> None:
    crashed = Ending(Outcome.crashed, step=12, reason="lost a peer")
    decisions = [decide(crashed, restarts, max_restarts=2, progressed=False) for restarts in (0, 1, 2)]
    assert [d.go_on for d in decisions] == [True, True, False]
    assert [d.restarts for d in decisions] == [1, 2, 2]
    assert "3 starts in a row made no new checkpoint" in decisions[2].reason


def test_a_kill_without_a_word_counts_as_a_crash() -> None:
    assert decide(None, restarts=0, max_restarts=1, progressed=False).go_on
    assert not decide(None, restarts=1, max_restarts=1, progressed=False).go_on


def test_a_new_checkpoint_refills_the_budget() -> None:
    decision = decide(Ending(Outcome.crashed), restarts=3, max_restarts=3, progressed=True)
    assert decision.go_on
    assert decision.restarts == 1


def test_without_budget_nothing_is_started_again_even_after_progress() -> None:
    decision = decide(Ending(Outcome.crashed), restarts=0, max_restarts=0, progressed=True)
    assert not decision.go_on
    assert "job.max_restarts=0 allows no other" in decision.reason


def test_out_of_memory_costs_nothing_while_the_microbatch_shrinks() -> None:
    decision = decide(Ending(Outcome.out_of_memory, micro_batch=4), restarts=3, max_restarts=3, progressed=False)
    assert decision.go_on
    assert decision.restarts == 3
    assert "micro_batch=4" in decision.reason


@pytest.mark.parametrize(("micro_batch", "shrank"), [(None, True), (4, False)])
def test_out_of_memory_ends_the_run_when_the_microbatch_cannot_shrink(micro_batch: int | None, shrank: bool) -> None:
    ending = Ending(Outcome.out_of_memory, micro_batch=micro_batch)
    assert not decide(ending, restarts=0, max_restarts=3, progressed=True, shrank=shrank).go_on


@pytest.mark.parametrize("ending", [None, Ending(Outcome.crashed), Ending(Outcome.out_of_memory, micro_batch=4)])
def test_nothing_is_started_again_once_somebody_asked_to_stop(ending: Ending | None) -> None:
    decision = decide(ending, restarts=0, max_restarts=3, progressed=True, stopped="SIGTERM")
    assert not decision.go_on
    assert "not started again (SIGTERM)" in decision.reason


def test_waits_grow_and_stay_short() -> None:
    waits = [back_off_s(restarts) for restarts in range(10)]
    assert waits == sorted(waits)
    assert waits[:4] == [0.0, 0.0, 0.5, 1.0]
    assert waits[-1] == 10.0


USERS = Ending(Outcome.crashed, 0, "TypeError: x", fault=Fault.user, error="TypeError", place="mine.py:3, in loss")


def test_an_error_of_the_user_before_the_first_step_is_not_tried_again() -> None:
    decision = decide(USERS, restarts=0, max_restarts=3, progressed=False, stepped=False)
    assert not decision.go_on
    assert "TypeError: x (mine.py:3, in loss)" in decision.reason
    assert "TypeError" not in decision.brief  # the trainer has shown it


@pytest.mark.parametrize(("step", "stepped"), [(40, False), (0, True)])
def test_an_error_of_the_user_once_a_step_has_succeeded_is_tried_once_more(step: int, stepped: bool) -> None:
    later = dataclasses.replace(USERS, step=step)
    assert decide(later, restarts=0, max_restarts=3, progressed=True, stepped=stepped).go_on
    again = decide(later, restarts=0, max_restarts=3, progressed=True, stepped=stepped, repeated=True)
    assert not again.go_on
    assert "same step twice" in again.reason


def test_a_machines_fault_before_the_first_step_is_tried_again() -> None:
    crashed = dataclasses.replace(USERS, fault=Fault.machine)
    assert decide(crashed, restarts=0, max_restarts=3, progressed=False, stepped=False, repeated=True).go_on


def test_who_has_left_the_debugger_is_not_asked_again() -> None:
    left = dataclasses.replace(USERS, fault=Fault.left, step=7)
    assert not decide(left, restarts=0, max_restarts=3, progressed=True).go_on


def test_a_store_that_may_come_back_is_tried_again_and_one_that_will_not_is_not_called_a_config() -> None:
    full = Ending(Outcome.config_error, 3, "cannot write x: No space left on device", error="StorageError")
    assert decide(full, restarts=0, max_restarts=1, progressed=False).go_on
    damaged = Ending(Outcome.config_error, 3, "no checkpoint", fault=Fault.user, error="CheckpointError")
    decision = decide(damaged, restarts=0, max_restarts=1, progressed=False)
    assert not decision.go_on
    assert decision.reason == "the checkpoints cannot be used (step 3)"


def test_the_same_error_is_known_by_its_step_type_and_line_and_not_by_its_words() -> None:
    first = dataclasses.replace(USERS, step=5, reason="KeyError: <object at 0x1>")
    assert dataclasses.replace(first, reason="KeyError: <object at 0x2>").repeats(first)
    for other in ({"step": 6}, {"error": "KeyError"}, {"place": "mine.py:4, in loss"}, {"fault": Fault.machine}):
        assert not dataclasses.replace(first, **other).repeats(first)  # type: ignore[arg-type]


def test_a_stall_is_tried_again_as_often_as_a_crash() -> None:
    stalled = Ending(Outcome.stalled, step=12, reason="frozen: rank 1 on n1 …")
    decision = decide(stalled, restarts=0, max_restarts=2, progressed=False)
    assert decision.go_on
    assert decision.reason.startswith("stalled at step 12: frozen: rank 1 on n1 …; starting again (1 of 2")
    assert not decide(stalled, restarts=2, max_restarts=2, progressed=False).go_on

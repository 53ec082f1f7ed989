"""When automatic copies are made: by what they cost, and never where a checkpoint of the run folder is due."""

from __future__ import annotations

import pytest

from everstep.trainer.checkpoint.copy_schedule import FIRST_STEPS, SHARE, CopySchedule, Plan


def train(schedule: CopySchedule, seconds: float, step_s: float, cost_s: float, slower_s: float = 0.0) -> list[int]:
    """Run a made-up training; return the steps of its copies. A copy goes on beside the three steps after it."""
    clock, step, beside, copied = 0.0, 0, 0, []
    while clock < seconds:
        step += 1
        took = step_s + (slower_s / 3 if beside else 0.0)
        clock += took
        schedule.step_took(took, beside > 0)
        if beside and not (beside := beside - 1):
            schedule.copied(cost_s)
        if step % schedule.every == 0:
            schedule.saved(step)
        elif schedule.due(step):
            if schedule.plan is not None and not beside:
                copied.append(step)
                clock, beside = clock + cost_s, 3
            schedule.plan = schedule.next_plan(step)
    return copied


@pytest.mark.parametrize(("step_s", "cost_s", "slower_s"), [
    (0.01, 0.001, 0.0), (0.01, 0.05, 0.0), (0.2, 0.02, 0.1), (1.0, 0.1, 0.4), (30.0, 0.5, 3.0), (0.05, 2.0, 0.0)
])  # fmt: skip
def test_copies_cost_less_than_their_share(step_s: float, cost_s: float, slower_s: float) -> None:
    seconds = 400 * max(1.0, (cost_s + slower_s) / SHARE)
    copied = train(CopySchedule(10**9), seconds, step_s, cost_s, slower_s)
    assert len(copied) > 100  # and they are made
    assert len(copied) * (cost_s + slower_s) < 1.1 * SHARE * seconds


def test_copies_become_rarer_when_they_cost_more_and_come_back() -> None:
    schedule = CopySchedule(10**9)
    for _ in range(40):
        schedule.step_took(0.1, copying=False)
    apart = []
    for cost_s in [0.01] * 5 + [0.5] * 8 + [0.01] * 12:
        schedule.copied(cost_s)
        apart.append(schedule.next_plan(100).apart)
    assert apart[4] == 10
    assert 450 <= apart[12] <= 500
    assert apart[-1] <= 12


def test_the_first_steps_are_only_measured() -> None:
    schedule = CopySchedule(10**9)
    assert next(step for step in range(101, 130) if schedule.due(step)) == 101 + FIRST_STEPS


def test_a_checkpoint_of_the_run_folder_takes_the_place_of_a_copy_near_it() -> None:
    schedule = CopySchedule(100)
    for _ in range(40):
        schedule.step_took(0.1, copying=False)
    assert schedule.next_plan(50) == Plan(60, 10)
    assert schedule.next_plan(85) == Plan(95, 10)
    assert schedule.next_plan(86) == Plan(100, 10)
    schedule.plan = Plan(100, 10)
    schedule.saved(100)
    assert [schedule.due(step) for step in (101, 109, 110)] == [False, False, True]
    schedule.copied(1000.0)
    assert schedule.next_plan(110).next_step == 200  # too dear: the run folder's alone are left


def test_an_evaluation_beside_a_copy_does_not_count_as_its_cost() -> None:
    schedule = CopySchedule(10**9)
    for _ in range(40):
        schedule.step_took(0.1, copying=False)
    schedule.step_took(60.0, copying=True)
    schedule.copied(0.01)
    assert schedule.next_plan(0).apart <= 0.22 / SHARE / 0.1

"""Where a run's time went: every second in one part, and each in the right one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.launch.runs.goodput import PARTS, Pause, Stretch, Timeline, goodput

moments = st.floats(0, 1000, allow_nan=False)
pauses = st.builds(Pause, st.sampled_from(["checkpoint", "evaluation", "data wait"]), moments, st.floats(0, 500))
stretches = st.builds(Stretch, moments, moments, st.none() | moments, st.none() | moments, st.lists(pauses, max_size=4))
timelines = st.builds(
    Timeline,
    moments,
    moments,
    st.lists(stretches, max_size=5),
    st.lists(moments, max_size=5),
    st.lists(moments, max_size=5),
)


def parts(timeline: Timeline) -> dict[str, float]:
    """Those that are not empty."""
    return {name: seconds for name, seconds in goodput(timeline).parts.items() if seconds}


@given(timelines)
def test_the_parts_sum_to_the_wall_time_whatever_was_recorded(timeline: Timeline) -> None:
    spent = goodput(timeline)
    assert sum(spent.parts.values()) == pytest.approx(max(0.0, timeline.until - timeline.since), abs=1e-6)
    assert spent.parts.keys() == PARTS.keys()
    assert min(spent.parts.values()) >= -1e-9
    assert 0 <= spent.fraction <= 1


def test_one_attempt_that_is_never_interrupted() -> None:
    attempt = Stretch(10, 100, first_step=14, pauses=[Pause("checkpoint", 50, 3), Pause("data wait", 90, 2)])
    assert parts(Timeline(10, 100, [attempt])) == {"start": 4, "checkpoint": 3, "data wait": 2, "productive": 81}


def test_a_job_waits_in_the_queue_and_starts_on_its_nodes() -> None:
    attempt = Stretch(70, 100, first_step=75)
    assert parts(Timeline(0, 100, [attempt], asked=[0], given=[60])) == {"queue": 60, "start": 15, "productive": 25}


def test_what_is_done_again_after_a_restart_is_not_productive() -> None:
    first = Stretch(0, 50, first_step=10)
    second = Stretch(60, 100, first_step=70, caught_up=80, pauses=[Pause("checkpoint", 75, 3)])
    # The save at 75 belongs to the replay: without the restart it would not have been.
    assert parts(Timeline(0, 100, [first, second])) == {"start": 20, "productive": 60, "down": 10, "replayed": 10}


def test_between_the_failure_and_the_decision_nothing_is_asked_for() -> None:
    first, second = Stretch(0, 50, first_step=0), Stretch(90, 100, first_step=92)
    spent = parts(Timeline(0, 100, [first, second], asked=[0, 60], given=[0, 88]))
    assert spent == {"productive": 58, "down": 10, "queue": 28, "start": 4}


def test_a_run_that_was_stopped_and_resumed_days_later_was_down_meanwhile() -> None:
    first, second = Stretch(0, 50, first_step=0), Stretch(1000, 1100, first_step=1000)
    assert parts(Timeline(0, 1100, [first, second]))["down"] == 950


def test_an_attempt_that_never_made_a_step_was_only_starting() -> None:
    assert parts(Timeline(0, 30, [Stretch(0, 30)])) == {"start": 30}


def test_a_writer_that_was_cut_off_counts_until_its_successor_began() -> None:
    zombie, successor = Stretch(0, 90, first_step=0), Stretch(40, 100, first_step=50)
    assert parts(Timeline(0, 100, [zombie, successor])) == {"productive": 90, "start": 10}


def test_a_run_that_waits_has_no_productive_second_yet() -> None:
    spent = goodput(Timeline(0, 30, asked=[0]))
    assert (spent.parts["queue"], spent.fraction) == (30, 0)


def test_a_job_that_has_its_nodes_and_no_attempt_yet_is_starting() -> None:
    assert parts(Timeline(0, 30, asked=[0.4], given=[0])) == {"down": 0.4, "start": 29.6}
    assert parts(Timeline(0, 30, asked=[0], given=[20])) == {"queue": 20, "start": 10}


def test_nothing_at_all_is_no_error() -> None:
    assert goodput(Timeline(5, 5)).fraction == 0


def test_a_hang_is_not_productive() -> None:
    attempt = Stretch(0, 100, first_step=10, pauses=[Pause("stalled", 100, 60)])
    assert parts(Timeline(0, 100, [attempt])) == {"start": 10, "stalled": 60, "productive": 30}

"""The score of a run: which evaluation is the best, and how many in a row were not."""

from __future__ import annotations

import pytest

from everstep.config import EvaluateConfig, Goal
from everstep.errors import ConfigError
from everstep.trainer.evaluate import keep_score
from everstep.trainer.state.train_state import Progress

NAN, INF = float("nan"), float("inf")


def score(values: list[float], **config: object) -> tuple[list[bool], Progress]:
    progress, told = Progress(), []
    for step, value in enumerate(values, 1):
        progress.step = step
        told.append(keep_score(progress, EvaluateConfig(**config), {"loss": value}))  # type: ignore[arg-type]
    return told, progress


@pytest.mark.parametrize(
    ("goal", "values", "better", "best", "best_step", "stale"),
    [
        (Goal.min, [3, 2, 2.5, 1], [True, True, False, True], 1, 4, 0),
        (Goal.max, [3, 2, 2.5, 4], [True, False, False, True], 4, 4, 0),
        (Goal.min, [3, 3, 3], [True, False, False], 3, 1, 2),
        (Goal.min, [0, -1, 0], [True, True, False], -1, 2, 1),
        (Goal.max, [0, 0, -1], [True, False, False], 0, 1, 2),
        (Goal.min, [INF, 5], [True, True], 5, 2, 0),
    ],
)
def test_the_best_is_the_least_or_the_most_and_the_first_of_equals(
    goal: Goal, values: list[float], better: list[bool], best: float, best_step: int, stale: int
) -> None:
    told, progress = score(values, goal=goal)
    assert told == better
    assert (progress.best, progress.best_step, progress.stale) == (best, best_step, stale)
    assert (progress.evaluated, progress.metric) == (len(values), values[-1])


@pytest.mark.parametrize("goal", list(Goal))
def test_nan_is_never_the_best_and_counts_as_stale(goal: Goal) -> None:
    told, progress = score([NAN, NAN], goal=goal)
    assert told == [False, False]
    assert (progress.best, progress.best_step, progress.stale) == (None, 0, 2)
    told, progress = score([NAN, 2.0, NAN], goal=goal)
    assert told == [False, True, False]
    assert (progress.best, progress.best_step, progress.stale) == (2.0, 2, 1)


@pytest.mark.parametrize(("goal", "values"), [(Goal.min, [1.0, 0.95, 0.9, 0.85]), (Goal.max, [1.0, 1.05, 1.1, 1.15])])
def test_a_gain_within_min_delta_is_none_and_small_ones_add_up(goal: Goal, values: list[float]) -> None:
    told, progress = score(values, goal=goal, min_delta=0.125)
    assert told == [True, False, False, True]
    assert progress.stale == 0


def test_patience_counts_evaluations_since_the_best() -> None:
    assert score([5, 4, 6, 7, 3, 9, 9, 9])[1].stale == 3


def test_a_metric_that_the_task_does_not_measure_is_said_with_those_it_does() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.metric='acuracy': the task measures loss, accuracy"):
        keep_score(Progress(), EvaluateConfig(metric="acuracy"), {"loss": 1.0, "accuracy": 0.5})

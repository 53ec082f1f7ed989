"""Who goes on, who is stopped, what a sampler asks and what stands on the leaderboard: without a process or a file."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.config import Goal, RunConfig
from everstep.launch.sweep.asha import Promotion, finalist, first_rung, promotion, reason_to_stop, rungs
from everstep.launch.sweep.config import Pruner, Sampler, SweepConfig
from everstep.launch.sweep.leaderboard import _front
from everstep.launch.sweep.samplers import Study, draws
from everstep.launch.sweep.search_space import Axis
from everstep.launch.sweep.state import SweepState, TrialOutcome

ASHA = SweepConfig(sampler=Sampler.random, pruner=Pruner.asha, trials=9)


def test_rungs_are_steps_of_the_run_and_the_last_is_all_of_it() -> None:
    assert rungs(ASHA, RunConfig(steps=900)) == (100, 300, 900)
    assert rungs(SweepConfig(), RunConfig(steps=900)) == (900,)


@pytest.mark.parametrize(("budget", "expected"), [("steps", (10, 40)), ("samples", (1, 2)), ("epochs", (32, 125))])
def test_budgets_are_steps_samples_or_epochs(budget: str, expected: tuple[int, ...]) -> None:
    from everstep.launch.sweep.config import Budget

    sweep = SweepConfig(pruner=Pruner.asha, rungs=[10, 40], budget=Budget(budget), epoch_samples=100)
    assert rungs(sweep, RunConfig(global_batch=32)) == expected


def test_nobody_goes_on_before_three_have_come() -> None:
    assert promotion({0: [1.0], 1: [2.0]}, 3, 3, {0: 0, 1: 0}) is None
    assert promotion({0: [1.0], 1: [2.0], 2: [0.5]}, 3, 3, dict.fromkeys(range(3), 0)) == Promotion(2, 1)


def test_who_has_gone_on_is_not_sent_again_and_higher_rungs_come_first() -> None:
    losses = {n: [float(n)] for n in range(9)} | {0: [0.0, 5.0], 1: [1.0, 4.0], 2: [2.0, 3.0]}
    assert promotion(losses, 3, 3, dict.fromkeys(losses, 0)) == Promotion(2, 2)


def test_who_is_under_way_is_not_sent_again() -> None:
    losses = {n: [float(n)] for n in range(6)}
    first = dict.fromkeys(losses, 0)
    assert promotion(losses, 3, 3, first, frozenset({0})) == Promotion(1, 1)
    assert promotion(losses, 3, 3, first, frozenset({0, 1})) is None


def test_what_came_to_nothing_never_goes_on() -> None:
    losses = {n: [math.inf] for n in range(9)}
    assert promotion(losses, 3, 3, dict.fromkeys(losses, 0)) is None


@given(st.permutations(range(27)))
def test_asha_spends_at_most_half_of_the_grid_in_any_order_and_never_drops_the_first(order: list[int]) -> None:
    """With losses that do not cross; as the driver does it, all begin before the first goes on."""
    losses: dict[int, list[float]] = {}
    steps, queue, first = 0, list(order), dict.fromkeys(range(27), 0)
    while True:
        if queue:
            trial = queue.pop()
            losses[trial] = [float(trial)]
            steps += 100
        elif (found := promotion(losses, 3, 3, first)) is not None:
            losses[found.trial].append(float(found.trial))
            steps += (200, 600)[found.rung - 1]
        else:
            break
    assert len(losses[0]) == 3
    assert steps == 27 * 100 + 9 * 200 + 3 * 600 < 27 * 900 / 2


def test_the_best_of_few_goes_on_to_the_end_when_nobody_has_earned_it() -> None:
    first = {0: 0, 1: 0}
    assert finalist({0: [2.0], 1: [1.0]}, 3, first) == Promotion(1, 1)
    assert finalist({0: [2.0], 1: [1.0, 3.0]}, 3, first) == Promotion(1, 2)
    assert finalist({0: [2.0], 1: [1.0, 3.0, 3.0]}, 3, first) is None
    assert finalist({0: [math.inf], 1: [1.0, math.inf]}, 3, first) is None


def test_hyperband_begins_in_every_rung_and_mostly_in_the_lowest() -> None:
    sweep = SweepConfig(pruner=Pruner.hyperband)
    begun = [first_rung(sweep, 3, n) for n in range(34)]
    assert set(begun) == {0, 1, 2}
    assert begun.count(0) > begun.count(1) >= begun.count(2)
    assert {first_rung(ASHA, 3, n) for n in range(30)} == {0}


def test_the_median_stops_what_is_worse_and_lets_the_better_half_go_on() -> None:
    sweep = SweepConfig(pruner=Pruner.median, warmup_trials=3)
    others = [{10: loss, 20: loss / 2} for loss in (1.0, 2.0, 3.0)]
    assert reason_to_stop(sweep, {10: 2.5}, others) is not None
    assert reason_to_stop(sweep, {10: 1.5}, others) is None
    assert reason_to_stop(sweep, {10: 2.5}, others[:2]) is None
    assert reason_to_stop(sweep, {10: math.nan}, others) is not None
    assert reason_to_stop(sweep, {}, others) is None


def test_patience_stops_what_does_not_get_better() -> None:
    sweep = SweepConfig(pruner=Pruner.patience, patience=2)
    assert reason_to_stop(sweep, {1: 3.0, 2: 2.0, 3: 2.5}, []) is None
    assert reason_to_stop(sweep, {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.1}, []) == "nothing better since step 2"


X, Y = Axis("x", "", low=-1.0, high=1.0), Axis("y", "", low=-1.0, high=1.0)


def told(trial: int, values: list[float], rung: int = 0, verdict: str = "done") -> dict[str, Any]:
    return {"event": "told", "trial": trial, "rung": rung, "verdict": verdict, "values": values, "step": 1}


def played(sweep: SweepConfig, count: int, objective: Callable[[dict[str, float]], list[float]],
           rebuilt_every: int = 10**9, goals: tuple[Goal, ...] = (Goal.min,)) -> SweepState:  # fmt: skip
    """A whole sweep in memory; the study is made anew from the records now and then."""
    story, study = SweepState(), Study(sweep, (X, Y), goals)
    for number in range(count):
        if number % rebuilt_every == 0:
            study = Study(sweep, (X, Y), goals)
            study.replay(story)
        values, attributes, at = study.ask(number)
        story.apply({"event": "asked", "identity": str(number), "name": "", "values": values, "drawn": values,
                     "attributes": attributes})  # fmt: skip
        study.know(story.trials[number], at)
        story.apply(told(number, objective(values)))
        study.tell(story.trials[number], story.trials[number].told[0])
    return story


def noisy(seed: int) -> Callable[[dict[str, float]], list[float]]:
    noise = random.Random(seed)
    return lambda v: [(v["x"] - 0.3) ** 2 + (v["y"] + 0.2) ** 2 + noise.gauss(0, 0.01)]


def quality(values: dict[str, float]) -> float:
    return (values["x"] - 0.3) ** 2 + (values["y"] + 0.2) ** 2


def test_tpe_is_better_than_random_on_a_noisy_quadratic_by_the_median_of_20_seeds() -> None:
    found: dict[str, list[float]] = {"tpe": [], "random": []}
    for seed in range(20):
        story = played(SweepConfig(sampler=Sampler.tpe, trials=40, seed=seed), 40, noisy(seed))
        best = min(story.trials, key=lambda trial: trial.told[0].values)
        found["tpe"].append(quality(best.values))
        tried = list(itertools.islice(draws(Sampler.random, (X, Y), seed), 40))
        noise = noisy(seed)
        found["random"].append(quality(min(tried, key=lambda values: noise(values))))
    assert statistics.median(found["tpe"]) < statistics.median(found["random"])


@pytest.mark.parametrize("sampler", [Sampler.tpe, Sampler.cmaes, Sampler.nsga2])
def test_a_study_that_is_rebuilt_again_and_again_asks_what_one_would_have_asked(sampler: Sampler) -> None:
    sweep = SweepConfig(sampler=sampler, trials=24)
    whole, torn = (played(sweep, 24, noisy(1), every) for every in (10**9, 3))
    assert [trial.values for trial in whole.trials] == [trial.values for trial in torn.trials]


def test_several_objectives_give_the_pareto_set() -> None:
    """Of (x², (x-1)²) with y as a loss on top, the front is 0 ≤ x ≤ 1 at y = 0."""
    sweep = SweepConfig(sampler=Sampler.nsga2, trials=400, metric=["a", "b"])
    story = played(sweep, 400, lambda v: [v["x"] ** 2 + abs(v["y"]), (v["x"] - 1) ** 2 + abs(v["y"])],
                   goals=(Goal.min, Goal.min))  # fmt: skip
    front = _front(story.trials, [Goal.min, Goal.min], 1)
    points = {trial.number: trial.told[0].values for trial in story.trials}
    by_hand = {n for n, p in points.items()
               if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())}  # fmt: skip
    assert front == by_hand
    assert len(front) > 5
    assert all(-0.2 < story.trials[n].values["x"] <= 1 and abs(story.trials[n].values["y"]) < 0.2 for n in front)


def test_the_pareto_set_is_the_one_that_can_be_worked_out_by_hand() -> None:
    """Of x² + y and (x - 2)² + y over whole numbers, the one to be small and the other's negative to be large."""
    story = SweepState()
    for number, (x, y) in enumerate(itertools.product(range(-2, 5), range(3))):
        values = {"x": x, "y": y}
        story.apply({"event": "asked", "identity": str(number), "name": "", "values": values, "drawn": values})
        story.apply(told(number, [x**2 + y, -((x - 2) ** 2) - y]))
    front = [story.trials[number].values for number in sorted(_front(story.trials, [Goal.min, Goal.max], 1))]
    assert front == [{"x": x, "y": 0} for x in (0, 1, 2)]


def test_a_wider_space_keeps_what_lies_within_it() -> None:
    sweep = SweepConfig(sampler=Sampler.tpe, trials=20)
    story = played(sweep, 12, noisy(0))
    study = Study(sweep, (Axis("x", "", low=-0.5, high=0.5), Y), [Goal.min])
    study.replay(story)
    inside = [trial for trial in story.trials if -0.5 <= trial.values["x"] <= 0.5]
    assert len(study.study.trials) == len(inside) < 12


def test_nan_is_a_result_and_the_worst() -> None:
    story = SweepState()
    for number in range(2):
        story.apply({"event": "asked", "identity": str(number), "name": "", "values": {}, "drawn": {}})
    story.apply({"event": "told", "trial": 0, "rung": 0, "verdict": "diverged", "values": [None], "step": 3})
    story.apply(told(1, [5.0]))
    assert [trial.losses([Goal.max]) for trial in story.trials] == [[math.inf], [-5.0]]
    assert story.failures == 0
    assert not story.trials[0].is_open


def test_a_trial_is_open_again_after_a_promotion_and_when_it_is_asked_for_again() -> None:
    story = SweepState()
    story.apply({"event": "asked", "identity": "a", "name": "", "values": {}, "drawn": {}})
    story.apply(told(0, [1.0]))
    assert not story.trials[0].is_open
    story.apply({"event": "promoted", "trial": 0, "rung": 1})
    assert story.trials[0].is_open
    story.apply(told(0, [], 1, "failed"))
    assert not story.trials[0].is_open
    assert story.trials[0].last is not None
    assert story.trials[0].last.verdict is TrialOutcome.failed
    story.apply({"event": "again", "trial": 0})
    assert story.trials[0].is_open

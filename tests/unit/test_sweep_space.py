"""What is tried: Hydra's grammar, draws that depend on nothing but the seed, names and identities of trials."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.compose import compose, groups
from everstep.config import Goal, RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import freeze, thaw
from everstep.launch.sweep.base_config import Base
from everstep.launch.sweep.config import Sampler, sweep_config
from everstep.launch.sweep.samplers import draws, halton
from everstep.launch.sweep.search_space import Axis, axis, identity, is_sweep, name

GROUPS = {"optimizer": ["adamw", "sgd"], "schedule": ["constant", "cosine"]}


@pytest.mark.parametrize(("text", "choices"), [
    ("lr=1e-4,3e-4", [1e-4, 3e-4]),
    ("depth=choice(4,8)", [4, 8]),
    ("seed=range(0,3)", [0, 1, 2]),
    ("p=range(0.1,0.4,0.1)", [0.1, 0.2, 0.3]),
    ("lr=sort(3,1,2)", [1, 2, 3]),
    ("optimizer=glob(*)", ["adamw", "sgd"]),
    ("optimizer=glob(*,exclude=s*)", ["adamw"]),
    ("x=choice(true,'a b',[1,2])", [True, "a b", [1, 2]]),
    ("x=null,1", [None, 1]),
    ("x=tag(some,choice(1,2))", [1, 2]),
    ("x=1,1,2", [1, 2]),
])  # fmt: skip
def test_lists_of_hydras_grammar_become_their_values(text: str, choices: list[Any]) -> None:
    assert list(axis(text, GROUPS, 0).choices) == choices


def test_shuffle_gives_the_same_order_each_time_and_another_with_another_seed() -> None:
    shuffled = [axis("x=shuffle(range(0,20))", GROUPS, seed).choices for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == list(range(20))


def test_intervals_know_their_kind() -> None:
    log, whole = axis("x=tag(log,interval(1e-5,1e-2))", GROUPS, 0), axis("x=int(interval(1,8))", GROUPS, 0)
    assert (log.low, log.high, log.log, log.whole) == (1e-5, 1e-2, True, False)
    assert (whole.low, whole.high, whole.log, whole.whole) == (1, 8, False, True)


@pytest.mark.parametrize(("text", "said"), [
    ("x=interval(2,1)", "must be smaller"),
    ("x=tag(log,interval(0,1))", "above 0"),
    ("x=glob(*)", "config groups"),
    ("x=1", "one value"),
    ("x=choice(", "cannot read"),
])  # fmt: skip
def test_a_space_that_cannot_be_is_told_in_a_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        axis(text, GROUPS, 0)


def test_one_value_is_no_sweep() -> None:
    assert not is_sweep("optimizer.lr=0.1")
    assert is_sweep("optimizer.lr=0.1,0.2")


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 50), st.integers(1, 50), st.booleans(), st.booleans())
def test_every_fraction_falls_into_the_interval(f: float, low: int, width: int, log: bool, whole: bool) -> None:
    found = Axis("x", "", low=low, high=low + width, log=log, whole=whole).at(f)
    assert low <= found <= low + width
    assert isinstance(found, int if whole else float)


@pytest.mark.parametrize("log", [False, True])
def test_every_whole_number_of_an_interval_is_reached(log: bool) -> None:
    found = {Axis("x", "", low=1, high=5, log=log, whole=True).at(n / 1000) for n in range(1000)}
    assert found == {1, 2, 3, 4, 5}


def test_a_grid_has_every_combination_once() -> None:
    axes = [axis("a=1,2,3", GROUPS, 0), axis("b=x,y", GROUPS, 0)]
    assert [tuple(each.values()) for each in draws(Sampler.grid, axes, 0)] == list(
        itertools.product([1, 2, 3], ["x", "y"])
    )


def test_a_grid_over_an_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no grid.*sweep.sampler"):
        draws(Sampler.grid, [axis("x=interval(0,1)", GROUPS, 0)], 0)


def test_random_values_of_a_key_do_not_change_when_another_key_is_swept_too() -> None:
    x, y = axis("x=interval(0,1)", GROUPS, 0), axis("y=interval(0,1)", GROUPS, 0)
    alone = [each["x"] for each in itertools.islice(draws(Sampler.random, [x], 3), 9)]
    together = [each["x"] for each in itertools.islice(draws(Sampler.random, [y, x], 3), 9)]
    assert alone == together
    assert len(set(alone)) == 9
    assert alone != [each["x"] for each in itertools.islice(draws(Sampler.random, [x], 4), 9)]


@pytest.mark.parametrize("base", [2, 3, 5])
def test_quasi_random_numbers_fill_every_part_alike(base: int) -> None:
    count = base**4
    parts = sorted(int(halton(number, base, 7) * count) for number in range(-1, count - 1))
    assert parts == list(range(count))


@given(st.dictionaries(st.sampled_from(["optimizer.lr", "seed", "model.depth"]), st.integers(), min_size=2))
def test_an_identity_knows_no_order(values: dict[str, int]) -> None:
    turned = dict(reversed(list(values.items())))
    assert identity(values, "base") == identity(turned, "base")
    assert identity(values, "base") != identity(values, "other")
    assert identity(values, "base") != identity({**values, "seed": values.get("seed", 0) + 1}, "base")


@given(st.dictionaries(st.sampled_from(["a.b", "c.b", "d"]), st.one_of(st.floats(), st.text(), st.none()), min_size=1))
def test_a_name_is_always_one_that_a_run_may_have(values: dict[str, Any]) -> None:
    told = name(values, "0123456789ab")
    assert RunConfig(run=told).run == told


def test_a_name_says_what_differs_and_as_much_of_the_key_as_is_needed() -> None:
    assert name({"optimizer.lr": 1e-3, "model.depth": 4}, "1a2b3cffffff") == "lr=0.001,depth=4-1a2b3c"
    assert name({"model.depth": 4, "task.depth": 5}, "1a2b3c") == "model.depth=4,task.depth=5-1a2b3c"


def base() -> Base:
    return Base(compose(["experiment=digits"]).run)


def test_values_are_given_the_types_of_their_keys() -> None:
    made = base().with_values({"clip": 1, "evaluate.goal": "min", "optimizer.lr": 0.5, "model.new": [1]})
    assert (made.clip, made.evaluate.goal) == (1.0, Goal.min)
    assert isinstance(made.clip, float)
    assert made.optimizer is not None
    assert made.model is not None
    assert (made.optimizer["lr"], made.model["new"]) == (0.5, [1])
    assert base().config.optimizer is not made.optimizer


@pytest.mark.parametrize(("values", "said"), [
    ({"steps": "many"}, "steps='many'"),
    ({"steps": 0}, "must be ≥ 1"),
    ({"evaluate.goal": "up"}, "evaluate.goal='up'"),
])  # fmt: skip
def test_a_value_that_does_not_fit_is_told_with_its_key(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        base().with_values(values)


def test_values_that_fit_only_together_are_set_together() -> None:
    made = base().with_values({"order.lanes": 2, "micro_batch": 8, "global_batch": 16})
    assert (made.order.lanes, made.micro_batch) == (2, 8)


def test_copying_gives_what_composing_gives() -> None:
    words = {"optimizer.lr": 0.125, "seed": 3, "clip": None, "schedule.warmup_steps": 7, "evaluate.goal": "min"}
    composed = compose(["experiment=digits", *(f"{k}={'null' if v is None else v}" for k, v in words.items())]).run
    assert base().with_values(words) == composed


def test_a_thousand_trials_are_a_thousand_configs_that_read_back() -> None:
    known, found = base(), {}
    axes = [axis(text, groups(), 0) for text in ("optimizer.lr=tag(log,interval(1e-5,1e-2))", "seed=range(0,10)")]
    for values in itertools.islice(draws(Sampler.qmc, axes, 0), 1000):
        config = known.with_values(values)
        assert config.optimizer is not None
        assert (config.optimizer["lr"], config.seed) == (values["optimizer.lr"], values["seed"])
        found[identity(values, "base")] = freeze(config)
    assert len(set(found.values())) == 1000
    assert all(math.isclose(thaw(text).global_batch, 64) for text in list(found.values())[::100])


@pytest.mark.parametrize(("node", "said"), [
    ({"sampler": "tpe"}, "sweep.trials"),
    ({"sampler": "tp"}, "sampler"),
    ({"trails": 3}, "did you mean 'sweep.trials'"),
    ({"metric": ["a", "b"], "sampler": "tpe", "trials": 3}, "nsga2"),
    ({"metric": ["a", "b"], "goal": ["min", "max", "min"]}, "one for each"),
    ({"pruner": "asha", "rungs": [3, 1]}, "small to large"),
    ({"budget": "epochs"}, "epoch_samples"),
])  # fmt: skip
def test_a_mistake_in_a_sweep_is_told_with_its_key(node: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep_config(node)

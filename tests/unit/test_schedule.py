"""A schedule of one's own: a function of progress, tried before the first step; each mistake in one line."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from everstep.config import ScheduleConfig, Shape
from everstep.errors import ConfigError
from everstep.trainer.schedule import curve_of, lr_factor

CALLS = itertools.count()
OWN = ["test_schedule"]


def power(progress: float, exponent: float = 2.0) -> float:
    return (1 - progress) ** exponent


def single(progress: float) -> np.float32:
    return np.float32(0.5)


def tensor(progress: float) -> torch.Tensor:
    return torch.tensor(progress)


def nan(progress: float) -> float:
    return float("nan") if progress > 0.5 else 1.0


def negative(progress: float) -> float:
    return 0.5 - progress


def nothing(progress: float) -> None:
    return None


def fails(progress: float) -> float:
    return 1 / progress


def counts(progress: float) -> float:
    return 1 / (1 + next(CALLS))


def narrow(progress: float) -> float:
    """Negative between the points that are tried."""
    return -1.0 if 0.5001 < progress < 0.5002 else 1.0


def config(name: str, **keys: object) -> ScheduleConfig:
    return ScheduleConfig(_target_=f"test_schedule.{name}", **keys)  # type: ignore[arg-type]


def test_a_function_gives_the_factor_after_the_warm_up_over_the_span() -> None:
    schedule = config("power", warmup_steps=10)
    curve = curve_of(schedule, OWN)
    factors = [lr_factor(step, 110, schedule, curve) for step in (1, 5, 10, 60, 110, 500)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 0.25, 0.0, 0.0])


def test_its_further_arguments_come_from_the_config() -> None:
    assert curve_of(config("power", args={"exponent": 1.0}), OWN)(0.75) == 0.25


def test_a_number_of_numpy_is_a_number() -> None:
    assert curve_of(config("single"), OWN)(0.1) == 0.5


@pytest.mark.parametrize(("name", "said"), [
    ("tensor", r"test_schedule\.tensor at progress 0 returns a Tensor: it must be a number; return value\.item\(\)"),
    ("nan", r"at progress 0\.515625 returns nan: the factor of the learning rate must be finite and ≥ 0"),
    ("negative", r"at progress 0\.515625 returns -0\.015625: the factor"),
    ("nothing", r"returns a NoneType: it must be a number; return a float"),
    ("fails", r"at progress 0 fails: ZeroDivisionError: .*division by zero; it is called with progress"),
    ("counts", r"and then .* for progress 1; make it a function of progress alone"),
    ("powr", r"has no 'powr'; did you mean 'power'\?"),
])  # fmt: skip
def test_a_mistake_in_the_function_is_one_line_before_the_first_step(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        curve_of(config(name), OWN)
    assert "\n" not in str(caught.value)


def test_an_argument_that_the_function_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.exponnt: test_schedule\.power takes no 'exponnt'"):
        curve_of(config("power", args={"exponnt": 1}), OWN)


def test_a_value_between_the_tried_points_is_checked_at_its_step() -> None:
    curve = curve_of(config("narrow"), OWN)
    with pytest.raises(ConfigError, match="returns -1"):
        curve(0.50015)


def test_a_function_outside_the_plugins_is_refused_and_not_imported() -> None:
    with pytest.raises(ConfigError, match=r"schedule\._target_='test_schedule\.power' is in none of the packages"):
        curve_of(config("power"), [])


def test_a_curve_of_two_kinds_and_arguments_of_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.shape='cosine': schedule\._target_=test_schedule\.power gives"):
        config("power", shape=Shape.cosine)
    with pytest.raises(ValueError, match=r"schedule\.args=.*: no function takes them while schedule\._target_ is null"):
        ScheduleConfig(args={"a": 1})

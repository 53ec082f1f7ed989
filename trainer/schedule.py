"""The learning rate as a function of the step: the built-in curves, or a function of the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

from everstep.config import ScheduleConfig, Shape
from everstep.errors import ConfigError
from everstep.trainer.plugins import instantiate

KEY = "schedule"
SAMPLED = 64
"""Points of progress at which a user's function is tried before the first step."""

Curve = Callable[[float], float]
"""Factor of the learning rate at a progress between 0 and 1."""


def lr_factor(step: int, steps: int, schedule: ScheduleConfig, curve: Curve) -> float:
    """Return the learning rate of update `step` (1 is the first) as a fraction of the optimizer's.

    Args:
        steps: steps that the schedule spans, with the warm-up.
        curve: result of `curve_of`.
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps * curve(0.0)
    span = max(1, steps - schedule.warmup_steps)
    return curve(min(1.0, (step - schedule.warmup_steps) / span))


def curve_of(schedule: ScheduleConfig, plugins: Iterable[str]) -> Curve:
    """Return the curve after the warm-up; a user's function is tried at a sample of points.

    Raises:
        ConfigError: the function fails, gives no finite number ≥ 0, or another one for the same progress.
    """
    node = schedule.node
    if node is None:
        return lambda done: _built_in(done, schedule)
    function, name = instantiate({**node, "_partial_": True}, KEY, plugins), str(node["_target_"])
    points = [number / SAMPLED for number in range(SAMPLED + 1)]

    def curve(done: float) -> float:
        return _checked(function, name, done)

    first = [curve(done) for done in points]
    for done, value in reversed([*zip(points, first, strict=True)]):
        if (again := curve(done)) != value:
            raise ConfigError(
                f"schedule._target_={name}: it gave {value:.6g} and then {again:.6g} for progress {done:g}; make it a "
                "function of progress alone, since a resume calls it anew"
            )
    return curve


def _checked(function: Callable[[float], Any], name: str, done: float) -> float:
    where = f"schedule._target_={name} at progress {done:g}"
    try:
        value = function(done)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{where} fails: {said}; it is called with progress (0 to 1) and schedule.args") from error
    if not isinstance(value, Real) or isinstance(value, bool):
        fix = "return value.item()" if hasattr(value, "item") else "return a float"
        raise ConfigError(f"{where} returns a {type(value).__name__}: it must be a number; {fix}")
    if not 0 <= float(value) < math.inf:
        raise ConfigError(f"{where} returns {float(value):g}: the factor of the learning rate must be finite and ≥ 0")
    return float(value)


def _built_in(done: float, schedule: ScheduleConfig) -> float:
    low = schedule.final_fraction
    if schedule.shape is Shape.cosine:
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.shape is Shape.linear:
        return 1 - (1 - low) * done
    if schedule.shape is Shape.wsd:
        return 1 - (1 - low) * max(0.0, done - (1 - schedule.decay_fraction)) / schedule.decay_fraction
    return 1.0

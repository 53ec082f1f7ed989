"""Samplers: pure functions of seed and number, and adaptive ones by Optuna.

Each suggestion gets a sampler with a seed made of the sweep's seed and the trial's number. So a suggestion depends only
on earlier suggestions and results, not on the number of drivers that the sweep has had.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from everstep.config import Goal
from everstep.errors import ConfigError
from everstep.launch.sweep.config import Sampler, SweepConfig
from everstep.launch.sweep.search_space import Axis
from everstep.launch.sweep.state import RungResult, SweepState, Trial, TrialOutcome, loss

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial
import itertools
import random
from collections.abc import Iterator


class Study:
    """An Optuna study of a sweep."""

    def __init__(self, sweep: SweepConfig, axes: Sequence[Axis], goals: Sequence[Goal]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                f"sweep.sampler={sweep.sampler.value} needs Optuna: pip install 'everstep[sweep]'; grid, random and "
                f"qmc do without"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.axes, self.goals = sweep, axes, goals
        self.distributions = {axis.key: _distribution(axis) for axis in axes}
        with _quiet():
            self.study = optuna.create_study(directions=["minimize"] * len(goals), sampler=self._sampler(0, 0))
        self._numbers: dict[int, int] = {}
        """Trial → its number in the study."""

    def replay(self, story: SweepState) -> None:
        """Bring the study to the state of the records. Trials outside the present search space are left out."""
        for trial, told in story.order:
            if told is not None:
                self.tell(trial, told)
            elif self.sweep.sampler is not Sampler.cmaes or not self._ask_again(trial):
                self._add(trial)
        self._know_parents()

    def _know_parents(self) -> None:
        """Restore NSGA-II's cached parents: the order in which it sees them depends on when it cached them."""
        from optuna.samplers import NSGAIISampler

        sampler, key = self.study.sampler, "NSGAIISampler:generation"
        if isinstance(sampler, NSGAIISampler):
            newest = max((each.system_attrs.get(key, 0) for each in self.study.get_trials(deepcopy=False)), default=0)
            for generation in range(1, newest + 1):
                sampler.get_parent_population(self.study, generation)

    def ask(self, trial: int, attempt: int = 0) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Return values for a trial, the sampler's attributes to record, and the trial's number in the study.

        Args:
            attempt: earlier suggestions for this trial that were rejected.
        """
        with _quiet():
            self.study.sampler = self._sampler(trial, attempt)
            asked = self.study.ask(self.distributions)
        return self._values(asked.params), _plain(self._known(asked.number).system_attrs), asked.number

    def know(self, trial: Trial, number: int) -> None:
        """Record the study number of the trial that a suggestion has become."""
        self._numbers[trial.number] = number

    def reject(self, number: int) -> None:
        """Record a suggestion that has become no trial."""
        import optuna

        self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def tell(self, trial: Trial, told: RungResult) -> None:
        """Report the trial's first result: at the first rung all trials have trained equally long."""
        import optuna

        number = self._numbers.get(trial.number)
        if number is None or self._known(number).state is not optuna.trial.TrialState.RUNNING:
            return
        losses = [loss(value, goal) for value, goal in zip(told.values, self.goals, strict=False)]
        if told.verdict in (TrialOutcome.failed, TrialOutcome.cancelled) or not losses:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
            return
        # A diverged trial counts as the worst. Samplers compute with the loss, so it is not infinite.
        self.study.tell(number, [each if math.isfinite(each) else 1e30 for each in losses])

    def _known(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _add(self, trial: Trial) -> None:
        import optuna

        params = {key: self._param(key, value) for key, value in trial.drawn.items() if key in self.distributions}
        inside = params.keys() == self.distributions.keys() and all(
            self._contains(key, value) for key, value in params.items()
        )
        if not inside:
            return
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=params,
                distributions=self.distributions,
                system_attrs=trial.attributes,
            )
        )
        self._numbers[trial.number] = len(self.study.get_trials(deepcopy=False)) - 1

    def _ask_again(self, trial: Trial) -> bool:
        """Rebuild CMA-ES by asking again: its state is a pickle, which is never loaded from a folder."""
        with _quiet():
            self.study.sampler = self._sampler(trial.number, 0)
            asked = self.study.ask(self.distributions)
        if self._values(asked.params) != trial.drawn:
            self.reject(asked.number)
            return False
        self._numbers[trial.number] = asked.number
        return True

    def _contains(self, key: str, value: Any) -> bool:
        distribution = self.distributions[key]
        try:
            return distribution._contains(distribution.to_internal_repr(value))
        except ValueError:
            return False

    def _param(self, key: str, value: Any) -> Any:
        axis = next(axis for axis in self.axes if axis.key == key)
        return value if axis.is_interval else json.dumps(value, sort_keys=True)

    def _values(self, params: dict[str, Any]) -> dict[str, Any]:
        return {axis.key: params[axis.key] if axis.is_interval else json.loads(params[axis.key]) for axis in self.axes}

    def _sampler(self, trial: int, attempt: int) -> BaseSampler:
        from optuna import samplers

        seed = (
            int.from_bytes(hashlib.sha256(f"{self.sweep.seed}:{trial}:{attempt}".encode()).digest()[:4], "big") % 2**31
        )
        with _quiet():
            if self.sweep.sampler is Sampler.tpe:
                return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
            if self.sweep.sampler is Sampler.cmaes:
                return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
            population = max(4, min(50, (self.sweep.trials or 50) // 8))
            return samplers.NSGAIISampler(seed=seed, population_size=population)


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna import distributions

    if axis.low is None or axis.high is None:
        return distributions.CategoricalDistribution([json.dumps(each, sort_keys=True) for each in axis.choices])
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that fit into a JSON record; pickles (hexadecimal text) are left out."""
    return {key: value for key, value in attributes.items() if isinstance(value, int | float | list)}


class _quiet(warnings.catch_warnings):
    """Suppress Optuna's warning that a feature is experimental."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


Values = dict[str, Any]


def draws(sampler: Sampler, axes: Sequence[Axis], seed: int) -> Iterator[Values]:
    """Yield the values of trial 0, 1, 2 …; only a grid is finite. ConfigError for a grid over an interval."""
    if sampler is Sampler.grid:
        for axis in axes:
            if axis.is_interval:
                raise ConfigError(f"{axis.text!r} has no grid; list values, or take sweep.sampler=random, qmc or tpe")
        keys = [axis.key for axis in axes]
        return (dict(zip(keys, row, strict=True)) for row in itertools.product(*(axis.choices for axis in axes)))
    made = _random if sampler is Sampler.random else _halton
    return (made(axes, seed, number) for number in itertools.count())


def _random(axes: Sequence[Axis], seed: int, number: int) -> Values:
    """Draw each key from its own stream, so that a further axis does not change the values of the others."""
    return {axis.key: axis.at(random.Random(f"{seed}:{number}:{axis.key}").random()) for axis in axes}


def _halton(axes: Sequence[Axis], seed: int, number: int) -> Values:
    return {axis.key: axis.at(halton(number, prime, seed)) for axis, prime in zip(axes, _primes(), strict=False)}


def halton(number: int, base: int, seed: int) -> float:
    """Return element `number` of the Halton sequence of a prime base, in [0, 1), scrambled by the seed."""
    fraction, scale, rest, place = 0.0, 1.0, number + 1, 0
    while scale > 1e-12:
        rest, digit = divmod(rest, base)
        scale /= base
        fraction += scale * _permutation(base, seed, place)[digit]
        place += 1
    return min(fraction, 1 - 1e-12)


def _permutation(base: int, seed: int, place: int) -> list[int]:
    digits = list(range(base))
    random.Random(hashlib.sha256(f"{seed}:{base}:{place}".encode()).digest()).shuffle(digits)
    return digits


def _primes() -> Iterator[int]:
    found: list[int] = []
    for number in itertools.count(2):
        if all(number % prime for prime in found):
            found.append(number)
            yield number

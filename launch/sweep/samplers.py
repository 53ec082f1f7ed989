"""Stateless samplers: trial n is a pure function of the seed and n, independent of results and timing."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from everstep.errors import ConfigError
from everstep.launch.sweep.config import Sampler
from everstep.launch.sweep.search_space import Axis

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

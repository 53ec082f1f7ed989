"""Learning-rate schedules as people bring them."""

from __future__ import annotations


def power(progress: float, exponent: float = 1.0) -> float:
    return (1 - progress) ** exponent

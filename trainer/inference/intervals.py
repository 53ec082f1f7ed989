"""Bootstrap intervals (B. Efron, 1979) of means over blocks of samples, and differences. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
GROUPS = 1000
"""Groups of neighbouring blocks that are drawn at most; the cost does not grow with the set."""
LEAST = 20
"""Blocks below which an interval would say nothing."""
LOW, HIGH = 2.5, 97.5
"""Percentiles: 95 of 100 such intervals hold the value of the whole population."""


def interval(sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> tuple[float, float] | None:
    """Return the 95 % interval of sum(sums) / sum(counts); None with fewer than LEAST blocks.

    Args:
        sums: [blocks].
        counts: [blocks], items.
        seed: the same seed draws the same blocks, so a repetition gives the same interval.
    """
    return _percentiles(_means(sums, counts, _weights(counts, seed)))


def paired_interval(
    first: tuple[NDArray[np.float64], NDArray[np.float64]],
    second: tuple[NDArray[np.float64], NDArray[np.float64]],
    seed: int,
) -> tuple[float, float] | None:
    """Return the 95 % interval of first - second, each (sums, counts) of the same blocks of samples.

    Both are measured on the same drawn blocks, so that what is hard for both does not widen the interval.
    """
    weights = _weights(first[1], seed)
    return _percentiles(_means(*first, weights) - _means(*second, weights)) if weights is not None else None


def _weights(counts: NDArray[np.float64], seed: int) -> NDArray[np.float64] | None:
    """Return how often each group is drawn: [DRAWS, groups]; None with too few blocks."""
    if len(counts) < LEAST:
        return None
    groups = min(len(counts), GROUPS)
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=DRAWS)
    return drawn.astype(np.float64)


def _means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], weights: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    if weights is None:
        return np.zeros(0)
    bounds = np.linspace(0, len(counts), weights.shape[1] + 1).astype(np.int64)[:-1]
    totals, items = weights @ np.add.reduceat(sums, bounds), weights @ np.add.reduceat(counts, bounds)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(totals / items)


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float] | None:
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    low, high = np.percentile(known, [LOW, HIGH])
    return float(low), float(high)

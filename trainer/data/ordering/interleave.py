"""Interleave of streams: assigns each position to a stream by a periodic pattern.

Both directions take constant time. A mixture of datasets is such a pattern, and so are the lanes of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from everstep.errors import ConfigError

Ints = NDArray[np.int64]

LONGEST_MIX = 100_000
LONGEST_PERIOD = 1 << 22


class Interleave:
    """Position p belongs to stream `pattern[p % period]`, and is its `index`-th position counted from 0."""

    def __init__(self, pattern: Sequence[int] | Ints, streams: int) -> None:
        self.pattern = np.asarray(pattern, dtype=np.int64)
        self.period = len(self.pattern)
        self.residues = [np.flatnonzero(self.pattern == stream) for stream in range(streams)]
        self.counts = [len(residues) for residues in self.residues]
        """Positions of each stream in one period."""
        self.ranks = np.empty(self.period, dtype=np.int64)
        """Index of each position of the period among those of its stream."""
        for residues in self.residues:
            self.ranks[residues] = np.arange(len(residues))

    def before(self, stream: int, position: int) -> int:
        """Return the number of positions below `position` that belong to `stream`."""
        turns, rest = divmod(position, self.period)
        return turns * self.counts[stream] + int(np.searchsorted(self.residues[stream], rest))

    def position(self, stream: int, index: int) -> int:
        """Return the position that is the `index`-th of `stream`."""
        turns, rest = divmod(index, self.counts[stream])
        return turns * self.period + int(self.residues[stream][rest])


def shares(weights: Sequence[float | Fraction]) -> list[Fraction]:
    """Return the weights as exact shares that sum to 1; a float counts as the decimal number it prints as."""
    exact = [Fraction(str(weight)) for weight in weights]
    for weight in exact:
        if weight <= 0:
            raise ConfigError(f"data.mix: weight {float(weight):g} must be > 0; leave the dataset out instead")
    total = sum(exact)
    return [weight / total for weight in exact]


def mix_pattern(weights: Sequence[Fraction]) -> list[int]:
    """Return one period of a mixture: at every prefix each stream is less than one position off its share.

    The chairman assignment of R. Tijdeman (Discrete Mathematics 32, 1980): among the streams that are due, choose the
    one whose next position has the earliest deadline.
    """
    period = math.lcm(*(weight.denominator for weight in weights))
    if period > LONGEST_MIX:
        raise ConfigError(
            f"data.mix: these weights repeat only after {period:,} samples, more than {LONGEST_MIX:,}; "
            "round them to fewer digits"
        )
    if len(weights) == 1:
        return [0]
    amounts = [int(weight * period) for weight in weights]
    counts = [0] * len(amounts)
    unit = 2 * len(amounts) - 2
    pattern = []
    for time in range(1, period + 1):
        due = [i for i, amount in enumerate(amounts) if unit * (amount * time - counts[i] * period) >= period]
        stream = min(due, key=lambda i: Fraction(unit * (counts[i] + 1) - 1, amounts[i]))
        counts[stream] += 1
        pattern.append(stream)
    return pattern


def crossed(mix: Sequence[int], lanes: int, width: int) -> Ints:
    """Return one period of mixture and lanes combined.

    Stream s in lane l is `s * lanes + l`; position p is in lane (p // width) % lanes.
    """
    period = math.lcm(len(mix), lanes * width)
    if period > LONGEST_PERIOD:
        raise ConfigError(
            f"order.lanes={lanes} with micro_batch={width} and these weights of data.mix repeat only after {period:,} "
            f"positions, more than {LONGEST_PERIOD:,}; choose rounder weights, or order.lanes=1"
        )
    positions = np.arange(period)
    return np.asarray(mix, dtype=np.int64)[positions % len(mix)] * lanes + positions // width % lanes

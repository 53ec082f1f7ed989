"""Bootstrap intervals of what a set measures."""

from __future__ import annotations

import numpy as np
import pytest

from everstep.trainer.inference.intervals import LEAST, interval, paired_interval


def drawn(seed: int, blocks: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of blocks whose mean per item is 1 in the long run."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 5, blocks).astype(np.float64)
    return random.normal(1.0, 0.5, blocks) * counts, counts


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    limits = [interval(*drawn(seed), seed=0) for seed in range(200)]
    held = sum(found is not None and found[0] <= 1.0 <= found[1] for found in limits)
    assert 180 <= held <= 199


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly_so() -> None:
    sums, counts = drawn(1)
    assert interval(sums, counts, 3) == interval(sums, counts, 3)
    assert interval(sums, counts, 3) != interval(sums, counts, 4)
    assert interval(sums, counts, 3) == pytest.approx(interval(sums, counts, 4), abs=0.02)


def test_a_paired_difference_is_narrower_than_either_where_both_find_the_same_samples_hard() -> None:
    sums, counts = drawn(2)
    better = sums - 0.05 * counts
    low, high = paired_interval((sums, counts), (better, counts), 0) or (0.0, 0.0)
    assert (low, high) == (pytest.approx(0.05), pytest.approx(0.05))
    alone = interval(sums, counts, 0)
    assert alone is not None
    assert alone[1] - alone[0] > 0.05


def test_few_blocks_have_no_interval_and_many_are_joined() -> None:
    assert interval(np.ones(LEAST - 1), np.ones(LEAST - 1), 0) is None
    sums, counts = drawn(3, blocks=12_345)
    found = interval(sums, counts, 0)
    assert found is not None
    assert found[0] < sums.sum() / counts.sum() < found[1]


def test_a_set_without_items_has_no_interval() -> None:
    assert interval(np.zeros(50), np.zeros(50), 0) is None

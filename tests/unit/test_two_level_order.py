"""Shards in a permuted line, samples permuted in windows of it, lanes and mixtures: what any order must keep."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.errors import ConfigError
from everstep.trainer.data.ordering.interleave import Interleave, mix_pattern, shares
from everstep.trainer.data.ordering.order import OrderSource, SampleOrder, microbatches

shard_rows = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0)
weights = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@st.composite
def orders(draw: st.DrawFn, mixed: bool = True) -> SampleOrder:
    """Any order at all: several sources of uneven shards, windows and lanes."""
    amounts = draw(weights) if mixed else [1]
    sources = [OrderSource(draw(shard_rows), share) for share in shares(amounts)]
    lanes, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return SampleOrder(
        sources,
        lanes * width * draw(st.integers(1, 3)),
        draw(st.integers(0, 2**63 - 1)),
        draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 8)),
        lanes=lanes,
        lane_width=width,
    )


@given(order=orders(mixed=False), epoch=st.integers(0, 10**6))
def test_every_epoch_visits_each_sample_exactly_once_with_any_window_and_lanes(order: SampleOrder, epoch: int) -> None:
    ids = order.ids(epoch * order.samples, order.samples)
    assert np.array_equal(np.sort(ids), np.arange(order.samples))
    assert set(order.epochs(epoch * order.samples, order.samples).tolist()) == {epoch}


@given(order=orders(), start=st.integers(0, 10**9))
def test_every_source_of_a_mixture_goes_through_whole_epochs_of_its_own(order: SampleOrder, start: int) -> None:
    count = 4 * max(int(sum(source.rows) / source.share) for source in order.sources) + 100
    epochs, ids = order.at(start, np.arange(count))
    for first, stop in zip(order.starts[:-1], order.starts[1:], strict=True):
        mine = (ids >= first) & (ids < stop)
        own = epochs[mine]
        assert np.all(np.diff(own) >= 0)
        for epoch in range(int(own[0]) + 1, int(own[-1])):
            assert np.array_equal(np.sort(ids[mine & (epochs == epoch)]), np.arange(first, stop))


@given(order=orders(), position=st.integers(0, 10**15))
def test_the_inverse_leads_from_any_sample_of_any_source_to_its_position(order: SampleOrder, position: int) -> None:
    epochs, ids = order.at(position, np.arange(9))
    for offset, (epoch, sample) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
        assert order.position_of(sample, epoch) == position + offset


@given(order=orders(), start=st.integers(0, 10**12), count=st.integers(1, 200), cut=st.integers(0, 200))
def test_a_position_gives_the_same_sample_wherever_one_enters(
    order: SampleOrder, start: int, count: int, cut: int
) -> None:
    whole = order.ids(start, count + cut + 1)
    assert np.array_equal(order.ids(start + cut, count), whole[cut : cut + count])


@given(order=orders(), world=st.integers(1, 64), micro=st.integers(1, 9))
@settings(max_examples=50)
def test_no_world_and_no_microbatch_changes_the_global_batches(order: SampleOrder, world: int, micro: int) -> None:
    batch = order.global_batch
    expected = order.ids(3 * batch, batch)
    seen = np.full(batch, -1)
    for rank in range(world):
        for slot in microbatches(batch, micro, rank, world):
            seen[slot.start : slot.stop] = order.at(3 * batch, np.arange(slot.start, slot.stop))[1]
    assert np.array_equal(seen, expected)


@given(amounts=st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_a_mixture_is_within_one_sample_of_its_shares_at_every_prefix(amounts: list[int]) -> None:
    exact = shares(amounts)
    pattern = Interleave(mix_pattern(exact), len(exact))
    positions = np.arange(2 * pattern.period + 1)
    for stream, share in enumerate(exact):
        counts = np.array([pattern.before(stream, position) for position in positions.tolist()])
        assert np.all(np.abs(counts - positions * float(share)) < 1)


def test_a_mixture_of_decimal_weights_holds_its_shares_exactly_at_the_period() -> None:
    order = SampleOrder([OrderSource([1000, 1000], share) for share in shares([0.7, 0.3])], 10, 5)
    ids = order.ids(0, 1000)
    assert np.count_nonzero(ids < 2000) == 700


def test_sources_repeat_at_their_own_rates() -> None:
    small, large = (OrderSource([rows], share) for rows, share in zip((10, 1000), shares([1, 1]), strict=True))
    order = SampleOrder([small, large], 10, seed=1)
    epochs, ids = order.at(0, np.arange(2000))
    assert epochs[ids < 10].max() == 99
    assert epochs[ids >= 10].max() == 0


@pytest.mark.parametrize("amounts", [[0.5, 0.0], [1, -1]])
def test_a_weight_that_is_not_positive_is_refused(amounts: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.mix: weight .* must be > 0"):
        shares(amounts)


def test_weights_with_too_many_digits_are_refused_with_the_limit() -> None:
    with pytest.raises(ConfigError, match="round them to fewer digits"):
        mix_pattern(shares([0.1234567, 0.8765433]))


def test_a_window_keeps_the_working_set_small_and_the_shuffle_mixes_its_shards() -> None:
    rows = [100] * 50
    order = SampleOrder([OrderSource(rows)], 10, seed=3, window=5)
    ids = order.ids(0, 5000)
    for start in range(0, 5000, 500):
        shards = np.unique(ids[start : start + 500] // 100)
        assert len(shards) == 5
    neighbours = np.abs(np.diff(ids)).mean() / 5000
    everything = np.abs(np.diff(SampleOrder(5000, 10, seed=3).ids(0, 5000))).mean() / 5000
    assert neighbours > 0.6 * everything


def test_uneven_shards_are_visited_window_by_window_too() -> None:
    rows = [3, 90, 41, 250, 7, 1, 88, 120]
    ends = np.cumsum(rows)
    order = SampleOrder([OrderSource(rows)], 10, seed=9, window=2)
    ids = order.ids(0, sum(rows))
    for start in range(0, sum(rows), order._orders[0].window):
        shards = np.unique(np.searchsorted(ends, ids[start : start + order._orders[0].window], side="right"))
        assert len(shards) <= 6


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_with_lanes_each_node_reads_only_its_share_of_the_shards(nodes: int) -> None:
    rows, lanes, width = [64] * 128, 16, 2
    order = SampleOrder([OrderSource(rows)], lanes * width, seed=2, window=32, lanes=lanes, lane_width=width)
    world = 16
    steps = order.samples // order.global_batch
    read: list[set[int]] = [set() for _ in range(nodes)]
    for rank in range(world):
        for slot in microbatches(order.global_batch, width, rank, world):
            offsets = np.arange(steps)[:, None] * order.global_batch + np.arange(slot.start, slot.stop)
            read[rank * nodes // world] |= set((order.at(0, offsets)[1] // 64).ravel().tolist())
    assert all(len(shards) <= len(rows) / nodes + lanes / nodes for shards in read)
    assert set().union(*read) == set(range(len(rows)))


def test_ten_to_the_twelve_samples_in_a_million_shards_are_entered_anywhere() -> None:
    order = SampleOrder([OrderSource(np.full(10**6, 10**6))], 1024, seed=4, window=64)
    for position in (0, 10**12 - 5, 123_456_789_012, 10**15 + 7):
        epochs, ids = order.at(position, np.arange(3))
        assert [order.position_of(i, e) for i, e in zip(ids.tolist(), epochs.tolist(), strict=True)] == list(
            range(position, position + 3)
        )


def test_the_two_level_order_of_a_seed_never_changes_between_versions() -> None:
    sources = [OrderSource([40, 60, 30], Fraction(7, 10)), OrderSource([50], Fraction(3, 10))]
    order = SampleOrder(sources, 8, seed=17, window=1, lanes=2, lane_width=4)
    assert order.ids(0, 12).tolist() == [49, 134, 46, 40, 24, 176, 19, 8, 131, 55, 47, 144]
    assert order.ids(10**12, 6).tolist() == [43, 143, 37, 22, 100, 162]

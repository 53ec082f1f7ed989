"""The sample order: every epoch whole, every world alike, every position reachable at once and invertible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.errors import ConfigError
from everstep.trainer.data.ordering.order import SampleOrder, microbatches, sample_keys, uniform
from everstep.trainer.data.ordering.permutation import KeyedPermutation, mix, mix_int

seeds = st.integers(-(2**63), 2**64)
few = st.integers(1, 300)


@given(samples=few, seed=seeds, epoch=st.integers(0, 10**9), shuffle=st.booleans())
def test_every_epoch_visits_each_sample_exactly_once(samples: int, seed: int, epoch: int, shuffle: bool) -> None:
    order = SampleOrder(samples, 7, seed, shuffle)
    ids = order.ids(epoch * samples, samples)
    assert np.array_equal(np.sort(ids), np.arange(samples))
    assert set(order.epochs(epoch * samples, samples).tolist()) == {epoch}


@given(samples=few, batch=few, seed=seeds, start=st.integers(0, 10**13), count=st.integers(0, 700))
def test_a_position_gives_the_same_sample_however_it_is_reached(
    samples: int, batch: int, seed: int, start: int, count: int
) -> None:
    order = SampleOrder(samples, batch, seed)
    whole = order.ids(start, count + 1)
    assert order.ids(start + count, 1)[0] == whole[-1]
    assert np.array_equal(order.ids(start, count // 2), whole[: count // 2])


@given(
    samples=st.integers(1, 2**60),
    batch=st.integers(1, 10**6),
    seed=seeds,
    position=st.integers(0, 2**62),
    shuffle=st.booleans(),
)
def test_the_inverse_leads_from_a_sample_back_to_its_position(
    samples: int, batch: int, seed: int, position: int, shuffle: bool
) -> None:
    order = SampleOrder(samples, batch, seed, shuffle)
    sample, epoch = int(order.ids(position, 1)[0]), int(order.epochs(position, 1)[0])
    assert order.position_of(sample, epoch) == position


@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=50)
def test_a_permutation_is_a_bijection_and_its_inverse_undoes_it(n: int, key: int) -> None:
    permutation = KeyedPermutation(n, key)
    images = permutation.forward(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))
    assert np.array_equal(permutation.inverse(images), np.arange(n))


@given(n=st.integers(1, 5000), keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_one_key_a_value_gives_what_each_key_gives_alone(n: int, keys: list[int]) -> None:
    values = np.arange(len(keys)) % n
    together = KeyedPermutation(n, np.array(keys, dtype=np.uint64)).forward(values)
    alone = [KeyedPermutation(n, key).forward(values[i : i + 1])[0] for i, key in enumerate(keys)]
    assert together.tolist() == alone


@given(
    batch=st.integers(1, 200),
    micro=st.integers(1, 60),
    world=st.integers(1, 12),
)
def test_every_world_works_through_the_same_microbatches(batch: int, micro: int, world: int) -> None:
    ranks = [microbatches(batch, micro, rank, world) for rank in range(world)]
    assert len({len(slots) for slots in ranks}) == 1
    in_turn = [ranks[turn % world][turn // world] for turn in range(world * len(ranks[0]))]
    real = [slot for slot in in_turn if slot.real]
    assert real == microbatches(batch, micro, 0, 1)
    assert [slot.index for slot in real] == list(range(len(real)))
    covered = np.concatenate([np.arange(slot.start, slot.stop) for slot in real])
    assert np.array_equal(covered, np.arange(batch))
    fillers = [slot for slot in in_turn if not slot.real]
    assert all(slot[:3] == real[-1][:3] for slot in fillers)


@given(samples=few, batch=st.integers(1, 50), micro=st.integers(1, 9), world=st.integers(1, 5), seed=seeds)
@settings(max_examples=50)
def test_every_world_gives_the_same_sequence_of_global_batches(
    samples: int, batch: int, micro: int, world: int, seed: int
) -> None:
    order = SampleOrder(samples, batch, seed)
    for step in range(3):
        expected = order.ids(step * batch, batch)
        seen = np.full(batch, -1)
        for rank in range(world):
            for slot in microbatches(batch, micro, rank, world):
                ids = order.at(step * batch, np.arange(slot.start, slot.stop))[1]
                seen[slot.start : slot.stop] = ids
        assert np.array_equal(seen, expected)


def test_position_ten_to_the_twelve_is_entered_at_once_and_continues_the_same_order() -> None:
    order = SampleOrder(999_983, 512, seed=3)
    position = 10**12
    epoch, entry = divmod(position, 999_983)
    whole_epoch = order.ids(epoch * 999_983, 999_983)
    assert np.array_equal(order.ids(position, 1000), whole_epoch[entry : entry + 1000])


def test_positions_far_beyond_sixty_four_bits_still_have_a_sample() -> None:
    order = SampleOrder(10**15, 512, seed=3)
    position = 10**30
    sample = int(order.ids(position, 1)[0])
    assert order.position_of(sample, position // 10**15) == position


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    order = SampleOrder(5000, 10, seed=1)
    first, second = order.ids(0, 5000), order.ids(5000, 5000)
    other = SampleOrder(5000, 10, seed=2).ids(0, 5000)
    for pair in ((first, second), (first, other), (first, np.arange(5000)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.06
        assert np.count_nonzero(pair[0] == pair[1]) < 12


def test_all_orders_of_five_samples_are_about_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        images = tuple(KeyedPermutation(5, mix_int(key)).forward(np.arange(5)).tolist())
        counts[images] = counts.get(images, 0) + 1
    chi_square = sum((count - 50) ** 2 / 50 for count in counts.values()) + 50 * (120 - len(counts))
    assert chi_square < 119 + 5 * (2 * 119) ** 0.5


def test_the_order_of_a_seed_never_changes_between_versions() -> None:
    order = SampleOrder(1000, 8, seed=17)
    assert order.ids(0, 8).tolist() == [877, 747, 187, 428, 822, 19, 87, 813]
    assert order.ids(10**12, 4).tolist() == [150, 718, 230, 313]


def test_mix_of_an_integer_and_of_an_array_agree() -> None:
    words = [0, 1, 2**63, 2**64 - 1, 0x1234]
    assert mix(np.array(words, dtype=np.uint64)).tolist() == [mix_int(word) for word in words]


def test_sample_keys_follow_seed_epoch_and_sample_and_draws_are_uniform() -> None:
    ids = np.arange(20_000)
    zero = np.zeros_like(ids)
    keys = sample_keys(1, zero, ids)
    assert len(set(keys.tolist())) == 20_000
    assert not np.any(keys == sample_keys(2, zero, ids))
    assert not np.any(keys == sample_keys(1, zero + 1, ids))
    assert keys[7] == sample_keys(1, zero[7:8], ids[7:8])[0]
    draws, others = uniform(keys, 0), uniform(keys, 1)
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws, others)[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SampleOrder(0, 4, 0), "data holds 0 training samples"),
        (lambda: SampleOrder(4, 0, 0), "global_batch=0"),
        (lambda: microbatches(8, 0, 0, 1), "micro_batch=0"),
        (lambda: microbatches(-1, 2, 0, 1), "global_batch=-1"),
    ],
)
def test_a_size_below_one_is_refused_with_its_key(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]

"""Random numbers of users' code: the same by every route, and none of them reaches another's generator."""

from __future__ import annotations

import errno
import functools
import random
import secrets
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, random_split
from torch.utils.data import Subset as TorchSubset

from everstep.config import BadSample, LoaderConfig, Worker
from everstep.errors import DataError
from everstep.rank_env import RankInfo
from everstep.storage.retries import retry
from everstep.trainer.data.collate import Pad
from everstep.trainer.data.dataset import ArrayDataset, MapDataset, Splits, Subset
from everstep.trainer.data.fetcher import Fetcher, Microbatch, MicrobatchRequest
from everstep.trainer.data.loader import Loader, evaluation_batches
from everstep.trainer.data.ordering.mixture import Mixture
from everstep.trainer.data.ordering.order import OrderSource, SampleOrder
from everstep.trainer.data.ordering.weighted import Weighted
from everstep.trainer.data.randomness import draws, draws_nothing, seeded
from everstep.trainer.data.rng_discovery import _log_limit, own_generators
from everstep.trainer.data.sklearn_datasets import shifted
from support.random_datasets import (
    SOURCES,
    WIDTH,
    Clocked,
    Drawing,
    RaggedDrawing,
    Stream,
    global_jitter,
    padded,
)

ROUTES = [(0, 0, Worker.process), (2, 0, Worker.process), (0, 2, Worker.process), (2, 2, Worker.process),
          (2, 0, Worker.thread), (2, 2, Worker.thread)]  # fmt: skip
Steps = list[list[Microbatch]]


def loaded(gather: Fetcher, first: int = 0, count: int = 12, rank: int = 0, world: int = 1, route: int = 0) -> Steps:
    prefetch, workers, worker = ROUTES[route]
    order = SampleOrder(len(gather.dataset), 10, seed=4)
    loader = Loader(
        gather, order, 4, RankInfo(rank, world), "cpu", LoaderConfig(prefetch=prefetch, workers=workers, worker=worker)
    )
    try:
        return list(islice(loader.steps(first), count))
    finally:
        loader.close()


def bits(steps: Steps) -> list[Any]:
    return [
        (m.index, m.ids.tolist(), {name: (column.shape, column.numpy().tobytes()) for name, column in m.batch.items()})
        for step in steps
        for m in sorted(step, key=lambda m: m.index)
        if m.real
    ]


def gather_of(kind: str, **options: Any) -> Fetcher:
    return Fetcher(MapDataset(Drawing(kind=kind)), 5, **options)


def states() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2:],
        random.getstate(),
    ]


@functools.cache
def expected(kind: str) -> list[Any]:
    return bits(loaded(gather_of(kind, augment=global_jitter)))


@pytest.mark.parametrize("route", range(1, len(ROUTES)))
@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "own"])
def test_no_loader_setting_changes_a_bit_of_what_a_transform_draws(kind: str, route: int) -> None:
    assert bits(loaded(gather_of(kind, augment=global_jitter), route=route)) == expected(kind)


@pytest.mark.parametrize("kind", SOURCES)
def test_draws_are_alike_in_a_new_dataset_on_every_world_and_after_every_entry(kind: str) -> None:
    for world in (1, 2, 3):
        ranks = [loaded(gather_of(kind, augment=global_jitter), 5, 7, rank, world) for rank in range(world)]
        together = [[m for rank in ranks for m in rank[step]] for step in range(7)]
        whole = list(expected(kind))
        assert bits(together) == whole[-len(bits(together)) :]


@pytest.mark.parametrize("kind", SOURCES)
def test_samples_epochs_and_seeds_draw_different_numbers(kind: str) -> None:
    ids, zeros = np.array([1, 2, 3]), np.zeros(3, np.int64)
    source = MapDataset(Drawing(kind=kind))
    noise = [
        Fetcher(source, seed)(MicrobatchRequest(ids, zeros + epoch, 1)).batch["x"]
        - torch.from_numpy(source.source.x[ids])
        for seed, epoch in ((5, 0), (5, 1), (6, 0))
    ]
    values = torch.stack(noise)[:, :, 0].round(decimals=6)
    assert len(values.unique()) == 9


@pytest.mark.parametrize("kind", SOURCES)
def test_reading_leaves_every_generator_of_the_process_as_it_was(kind: str) -> None:
    gather = gather_of(kind, augment=global_jitter)
    before, threads = states(), torch.get_num_threads()
    loaded(gather, route=1)
    loaded(gather, route=3, count=2)
    list(evaluation_batches(gather, 4, RankInfo(), "cpu"))
    assert states() == before
    assert torch.get_num_threads() == threads


def test_a_generator_of_the_datasets_own_is_put_back_too() -> None:
    transform = SOURCES["own"]()
    [generator, *_] = (found for found in own_generators(transform) if isinstance(found, np.random.Generator))
    data = Drawing()
    data.transform = transform
    before = generator.bit_generator.state
    loaded(Fetcher(MapDataset(data), 5))
    assert generator.bit_generator.state == before


def test_a_sample_that_fails_leaves_the_generators_as_they_were() -> None:
    class Failing(Drawing):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            torch.rand(3)
            raise RuntimeError("no")

    before = states()
    with pytest.raises(DataError, match="RuntimeError: no"):
        loaded(Fetcher(MapDataset(Failing()), 5))
    assert states() == before


@pytest.mark.parametrize("wrap", [
    lambda data: Subset(data, range(len(data))),
    lambda data: MapDataset(TorchSubset(data, range(len(data)))),
    lambda data: MapDataset(ConcatDataset([data])),
    lambda data: Mixture([MapDataset(data)], [1]),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["numpy", "own", "module"])
def test_what_wraps_a_dataset_changes_none_of_its_draws(kind: str, wrap: Callable[[Drawing], Any]) -> None:
    plain, wrapped = (Fetcher(found, 5) for found in (MapDataset(Drawing(kind=kind)), wrap(Drawing(kind=kind))))
    assert bits(loaded(wrapped)) == bits(loaded(plain))


def test_a_mixture_seeds_each_sample_whatever_stands_beside_it() -> None:
    parts = [
        MapDataset(Drawing(5, "numpy")),
        ArrayDataset({name: value.numpy() for name, value in quiet_columns(4).items()}),
    ]
    mixed = Fetcher(Mixture(parts, [0.5, 0.5]), 5)
    zeros = np.zeros(3, np.int64)
    both = mixed(MicrobatchRequest(np.array([2, 6, 4]), zeros, 1)).batch["x"]
    alone = mixed(MicrobatchRequest(np.array([4]), zeros[:1], 1)).batch["x"]
    assert torch.equal(both[2], alone[0])


def quiet_columns(samples: int) -> dict[str, Tensor]:
    zeros = torch.zeros(samples)
    return {"x": torch.zeros(samples, WIDTH), "y": zeros, "label": zeros.long()}


@pytest.mark.parametrize("route", range(len(ROUTES)))
def test_ragged_samples_and_a_collate_that_draws_are_exact_by_every_route(route: int) -> None:
    gather = Fetcher(Splits(RaggedDrawing(), collate_fn=padded).train, 5)
    assert bits(loaded(gather, route=route)) == bits(loaded(gather))


def test_vectors_of_different_lengths_go_to_the_collate_of_the_splits() -> None:
    gather = Fetcher(MapDataset(RaggedDrawing()), 5, collate=Pad())
    batch = gather(MicrobatchRequest(np.arange(5), np.zeros(5, np.int64), 1)).batch
    assert batch["x"].shape == (5, int(batch["lengths"].max()))
    with pytest.raises(DataError, match="'x' differ in length"):
        Fetcher(MapDataset(RaggedDrawing()), 5)(MicrobatchRequest(np.arange(5), np.zeros(5, np.int64), 1))


class Odd:
    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def lengths_of(batch: Any) -> dict[str, Tensor]:
    return {"length": torch.tensor([len(text) for text in batch["text"]])}


def test_text_goes_to_the_collate_as_a_list() -> None:
    source = MapDataset(Odd({"text": "ab"}, {"text": "abc"}))
    request = MicrobatchRequest(np.arange(2), np.zeros(2, np.int64), 1)
    assert Fetcher(source, 5, collate=lengths_of)(request).batch["length"].tolist() == [2, 3]
    with pytest.raises(DataError, match="column 'text' of a batch is a list, not a tensor"):
        Fetcher(source, 5)(request)


@pytest.mark.parametrize(("samples", "said"), [
    (({"x": torch.zeros(2, 2)}, {"x": torch.zeros(2, 3)}), r"'x' are of shapes \[2, 2\] and \[2, 3\]; give"),
    (({"x": 1}, {"y": 1}), "a sample has no 'x'"),
    (({"x": object()}, {"x": object()}), "column 'x' holds a object"),
])  # fmt: skip
def test_samples_that_make_no_batch_are_said_with_their_column(samples: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        MapDataset(Odd(*samples)).take(np.arange(2))


class OnlyIterated:
    def __iter__(self) -> Any:
        return iter([1])


@pytest.mark.parametrize("source", [Stream(), OnlyIterated(), (n for n in range(3))])
def test_an_iterable_dataset_is_refused_with_what_to_use(source: Any) -> None:
    with pytest.raises(DataError, match=r"can only be iterated.*map-style dataset.*everstep data prepare") as error:
        Splits(source)
    assert "\n" not in str(error.value)


class Secretive(Drawing):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor(secrets.randbelow(1 << 60))}


def holding(found: object) -> Drawing:
    data = Drawing()
    data.extra = {"deep": [found]}  # type: ignore[attr-defined]
    return data


@pytest.mark.parametrize(("data", "said"), [
    (Clocked(), "'x' of samples 0 to 7 differs each time"),
    (Secretive(), "'x' of samples 0 to 7 differs each time"),
])  # fmt: skip
def test_a_sample_that_is_another_one_each_time_is_refused_at_the_start(data: Drawing, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Fetcher(MapDataset(data), 5).check_repeats()
    Fetcher(MapDataset(Drawing(kind="own")), 5).check_repeats()


def test_a_generator_that_nothing_can_seed_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"random\.SystemRandom, which nothing can seed"):
        loaded(Fetcher(MapDataset(holding(random.SystemRandom())), 5))


def test_only_code_that_says_that_it_draws_nothing_runs_in_the_thread_beside_the_step() -> None:
    class Inherits(ArrayDataset):
        """What a subclass does, its base does not know."""

    array = {"x": np.zeros(3)}
    assert not draws(ArrayDataset(array))
    assert not draws(shifted)
    assert not draws(None)
    assert not draws(Pad())
    assert not draws(functools.partial(shifted))
    assert not draws(Subset(ArrayDataset(array), [0]))
    assert draws(Inherits(array))
    assert draws(global_jitter)
    assert draws(MapDataset(Drawing()))
    assert draws(Stream().__iter__)
    assert not draws(draws_nothing(lambda batch, keys: batch))


def test_an_endless_list_of_samples_is_not_searched_for_generators() -> None:
    data = holding([object() for _ in range(100_000)])
    start = time.thread_time()
    for _ in range(20):
        own_generators(MapDataset(data))
    assert time.thread_time() - start < 1


def test_waiting_for_a_store_draws_nothing_from_pythons_generator() -> None:
    answers = iter([TimeoutError("busy"), None])

    def work() -> None:
        if (error := next(answers)) is not None:
            raise error

    before = states()
    retry(work, "a store")
    assert states() == before


def test_a_data_factory_is_seeded_and_leaves_no_trace() -> None:
    before = states()
    lengths = []
    for _ in range(2):
        with seeded(3):
            first, _ = random_split(Drawing(), [20, 21])
            lengths.append((list(first.indices), np.random.rand(), random.random()))
    assert lengths[0] == lengths[1]
    assert states() == before


def weighted_order(weights: list[float], batch: int = 10, seed: int = 0) -> SampleOrder:
    return SampleOrder([OrderSource([len(weights)], weights=np.array(weights))], batch, seed)


def test_samples_come_as_often_as_their_weights_say_and_never_with_weight_zero() -> None:
    weights = [0.0, 1.0, 2.0, 5.0, 0.0]
    _, ids = weighted_order(weights).at(0, np.arange(80_000))
    shares = np.bincount(ids, minlength=5) / len(ids)
    assert shares[[0, 4]].tolist() == [0, 0]
    assert shares[1:4] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.008)
    pairs = np.bincount(ids[:-1] * 5 + ids[1:], minlength=25).reshape(5, 5) / len(ids)
    assert pairs == pytest.approx(np.outer(shares, shares), abs=0.008)


def test_draws_by_weight_are_a_pure_function_of_the_position() -> None:
    order = weighted_order([1.0, 3.0, 0.5, 2.0])
    turns, ids = order.at(0, np.arange(1000))
    for position, count in ((0, 7), (3, 40), (998, 2)):
        found = order.at(position, np.arange(count))
        assert np.array_equal(found[0], turns[position : position + count])
        assert np.array_equal(found[1], ids[position : position + count])
    assert len(set(turns.tolist())) == 1000
    assert not np.array_equal(weighted_order([1.0, 3.0, 0.5, 2.0], seed=1).at(0, np.arange(1000))[1], ids)


def test_a_sample_that_is_drawn_twice_is_augmented_anew() -> None:
    data = Weighted(Drawing(3), [0, 1, 0])
    order = SampleOrder([OrderSource([3], weights=data.weights)], 10, seed=4)
    loader = Loader(Fetcher(data, 5), order, 10, RankInfo(), "cpu", LoaderConfig(prefetch=0))
    [microbatch] = next(loader.steps(0))
    assert set(microbatch.ids.tolist()) == {1}
    assert len(microbatch.batch["x"][:, 0].unique()) == 10


@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1]])
def test_weights_that_cannot_be_drawn_by_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights"):
        Weighted(Drawing(3), weights)


def test_weights_change_the_digest() -> None:
    data = ArrayDataset({"x": np.zeros(3)})
    digests = {data.digest, Weighted(data, [1, 2, 3]).digest, Weighted(data, [1, 2, 4]).digest}
    assert len(digests) == 3


class OwnDice:
    def __init__(self) -> None:
        self.generator = torch.Generator()


@pytest.mark.parametrize("layers", [1, 250])
def test_a_generator_is_found_behind_a_large_model(layers: int) -> None:
    model = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU()) for _ in range(layers)])
    task = OwnDice()
    assert own_generators(model, task) == [task.generator]


def test_a_part_with_too_many_objects_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Crowded:
        def __init__(self) -> None:
            self.pages = [[[number, page] for number in range(30)] for page in range(30)]

    _log_limit.cache_clear()  # each kind is logged once a process
    assert own_generators(Crowded(), OwnDice(), most=100)
    assert "Crowded holds so many objects" in caplog.text
    assert "OwnDice" not in caplog.text


class Remote:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3:
            raise self.error
        return {"x": torch.tensor([float(index)])}


@pytest.mark.parametrize(
    "error", [TimeoutError("no answer"), OSError(errno.ESTALE, "stale file handle"), MemoryError()]
)
def test_a_sample_behind_a_fault_of_the_machine_is_not_left_out(error: Exception) -> None:
    gather = Fetcher(MapDataset(Remote(error)), 5, on_bad=BadSample.skip)
    with pytest.raises(type(error)):
        loaded(gather)


def test_a_sample_that_is_itself_bad_is_left_out() -> None:
    gather = Fetcher(MapDataset(Remote(ValueError("no image"))), 5, on_bad=BadSample.skip)
    assert any(m.skipped for step in loaded(gather) for m in step)

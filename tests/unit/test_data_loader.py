"""The loader: the same samples in the same order by every route, on every world, after every restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everstep.config import LoaderConfig, Worker
from everstep.errors import ConfigError, DataError
from everstep.rank_env import RankInfo
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from everstep.trainer.data.collate import Pad
from everstep.trainer.data.columns import Columns
from everstep.trainer.data.dataset import ArrayDataset
from everstep.trainer.data.fetcher import Fetcher, Microbatch
from everstep.trainer.data.loader import Loader, evaluation_batches
from everstep.trainer.data.ordering.order import Ids, OrderSource, SampleOrder, uniform
from everstep.trainer.data.ordering.permutation import Words
from everstep.trainer.data.workers import Prefetcher
from support.processes import until
from support.shard_datasets import numbered, write_dataset

SAMPLES = 37
SEED = 5
ON_DEMAND = LoaderConfig(prefetch=0)


def numbers(samples: int = SAMPLES) -> ArrayDataset:
    return ArrayDataset({"x": np.arange(samples, dtype=np.float32), "id": np.arange(samples)})


def noisy(batch: dict[str, Tensor], keys: Words) -> dict[str, Tensor]:
    return {**batch, "x": batch["x"] + torch.from_numpy(uniform(keys, 0))}


def taken(loader: Loader, first_step: int, count: int) -> list[list[Microbatch]]:
    try:
        return list(islice(loader.steps(first_step), count))
    finally:
        loader.close()


def as_values(steps: list[list[Microbatch]]) -> list[object]:
    return [
        (m.index, m.real, m.ids.tolist(), {name: column.tolist() for name, column in m.batch.items()})
        for step in steps
        for m in step
    ]


@pytest.mark.parametrize("worker", Worker)
@pytest.mark.parametrize(("prefetch", "workers"), [(1, 0), (4, 0), (0, 2), (3, 2), (2, 4)])
def test_prefetch_and_workers_do_not_change_a_single_value(prefetch: int, workers: int, worker: Worker) -> None:
    order = SampleOrder(SAMPLES, 10, seed=4)
    inline = Loader(Fetcher(numbers(), SEED, augment=noisy), order, 4, RankInfo(0, 2), "cpu", ON_DEMAND)
    config = LoaderConfig(prefetch=prefetch, workers=workers, worker=worker)
    other = Loader(Fetcher(numbers(), SEED, augment=noisy), order, 4, RankInfo(0, 2), "cpu", config)
    assert as_values(taken(other, 3, 12)) == as_values(taken(inline, 3, 12))


@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 30),
    micro=st.integers(1, 8),
    world=st.integers(1, 4),
    first_step=st.integers(0, 10**11),
)
@settings(max_examples=40, deadline=None)
def test_the_ranks_of_any_world_together_load_the_global_batches_of_the_order(
    samples: int, batch: int, micro: int, world: int, first_step: int
) -> None:
    order = SampleOrder(samples, batch, seed=1)
    data = numbers(samples)
    ranks = [
        taken(
            Loader(Fetcher(data, SEED, augment=noisy), order, micro, RankInfo(rank, world), "cpu", ON_DEMAND),
            first_step,
            2,
        )
        for rank in range(world)
    ]
    single = taken(
        Loader(Fetcher(data, SEED, augment=noisy), order, micro, RankInfo(), "cpu", ON_DEMAND),
        first_step,
        2,
    )
    for step in range(2):
        real = sorted((m for rank in ranks for m in rank[step] if m.real), key=lambda m: m.index)
        assert as_values([real]) == as_values([single[step]])
        ids = np.concatenate([m.ids for m in real])
        assert np.array_equal(ids, order.ids((first_step + step) * batch, batch))
        assert len({len(rank[step]) for rank in ranks}) == 1


def test_entering_at_a_step_continues_what_a_run_from_the_start_would_have_seen() -> None:
    order = SampleOrder(SAMPLES, 5, seed=9)
    whole = taken(Loader(Fetcher(numbers(), SEED), order, 2, RankInfo(), "cpu", ON_DEMAND), 0, 30)
    rest = taken(Loader(Fetcher(numbers(), SEED), order, 2, RankInfo(), "cpu", LoaderConfig(prefetch=2)), 17, 13)
    assert as_values(rest) == as_values(whole[17:])


def test_an_augmented_sample_depends_on_its_epoch_but_not_on_its_place_in_the_batch() -> None:
    data = numbers()
    seen: dict[tuple[int, int], float] = {}
    for batch in (5, 37):
        order = SampleOrder(SAMPLES, batch, seed=2)
        steps = taken(
            Loader(Fetcher(data, SEED, augment=noisy), order, batch, RankInfo(), "cpu", ON_DEMAND),
            0,
            74 // batch,
        )
        for position, (sample, value) in enumerate(
            (int(i), float(x)) for [m] in steps for i, x in zip(m.ids, m.batch["x"], strict=True)
        ):
            assert seen.setdefault((position // SAMPLES, sample), value) == value
    assert all(seen[0, sample] != seen[1, sample] for sample in range(30))


def test_an_inline_step_costs_little() -> None:
    data = ArrayDataset({"tokens": np.zeros((5000, 65), dtype=np.uint8)})
    steps = Loader(Fetcher(data, SEED), SampleOrder(5000, 32, 0), 32, RankInfo(), "cpu", ON_DEMAND).steps(0)
    next(steps)
    best = min(_seconds(steps, 200) for _ in range(5))
    assert best / 200 < 200e-6  # about 15 µs on an idle machine


def _seconds(steps: Iterator[object], count: int) -> float:
    start = time.thread_time()
    for _ in islice(steps, count):
        pass
    return time.thread_time() - start


class Failing:
    digest = "failing"

    def __len__(self) -> int:
        return SAMPLES

    def take(self, ids: np.ndarray) -> dict[str, Tensor]:
        if 11 in ids.tolist():
            raise OSError("the disk is on fire")
        return {"x": torch.from_numpy(ids)}


def test_an_error_of_the_prefetch_thread_is_raised_in_its_turn_with_its_own_traceback() -> None:
    order = SampleOrder(SAMPLES, 1, seed=0, shuffle=False)
    loader = Loader(Fetcher(Failing(), SEED), order, 1, RankInfo(), "cpu", LoaderConfig(prefetch=4))
    steps = loader.steps(0)
    assert [int(m.ids[0]) for [m] in islice(steps, 11)] == list(range(11))
    with pytest.raises(OSError, match="on fire") as caught:
        next(steps)
    assert "take" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    loader.close()


def test_close_returns_at_once_while_the_thread_waits_for_room() -> None:
    loader = Loader(
        Fetcher(numbers(), SEED), SampleOrder(SAMPLES, 4, 0), 4, RankInfo(), "cpu", LoaderConfig(prefetch=1)
    )
    next(loader.steps(0))
    start = time.perf_counter()
    loader.close()
    assert time.perf_counter() - start < 2
    assert not any(thread.name == "everstep-data" for thread in threading.enumerate())


@pytest.mark.parametrize(("prefetch", "workers"), [(2, 0), (0, 1)])
def test_an_iterator_ends_when_the_loader_is_closed_and_another_may_follow(prefetch: int, workers: int) -> None:
    order = SampleOrder(SAMPLES, 4, 0)
    loader = Loader(
        Fetcher(numbers(), SEED), order, 4, RankInfo(), "cpu", LoaderConfig(prefetch=prefetch, workers=workers)
    )
    first = loader.steps(0)
    next(first)
    loader.close()
    assert next(first, None) is None
    assert as_values(taken(loader, 5, 2)) == as_values(
        taken(Loader(Fetcher(numbers(), SEED), order, 4, RankInfo(), "cpu", ON_DEMAND), 5, 2)
    )


def test_close_does_not_hang_on_a_source_that_never_answers() -> None:
    release = threading.Event()

    def silent() -> Iterator[int]:
        release.wait()
        yield 1

    prefetcher = Prefetcher(silent(), 1)
    prefetcher.close(timeout=0.05)
    assert next(prefetcher, None) is None
    release.set()


def test_a_signal_interrupts_the_wait_for_data() -> None:
    release = threading.Event()

    def silent() -> Iterator[int]:
        release.wait()
        yield 1

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    prefetcher = Prefetcher(silent(), 1)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(prefetcher)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
        release.set()
        prefetcher.close()


def test_the_time_spent_waiting_is_counted() -> None:
    class Slow(Failing):
        def take(self, ids: np.ndarray) -> dict[str, Tensor]:
            time.sleep(0.002)
            return {"x": torch.from_numpy(ids)}

    loader = Loader(Fetcher(Slow(), SEED), SampleOrder(SAMPLES, 1, 0), 1, RankInfo(), "cpu", ON_DEMAND)
    taken(loader, 0, 5)
    assert loader.wait_s >= 0.01


WORKER_SCRIPT = """
    import os, signal, sys, time
    import numpy as np
    from everstep.config import LoaderConfig
    from everstep.rank_env import RankInfo
    from everstep.trainer.data.dataset import ArrayDataset
    from everstep.trainer.data.fetcher import Fetcher
    from everstep.trainer.data.loader import Loader
    from everstep.trainer.data.ordering.order import SampleOrder

    data = ArrayDataset({"x": np.arange(64)})
    loader = Loader(Fetcher(data, 5), SampleOrder(64, 4, 0), 4, RankInfo(), "cpu", LoaderConfig(workers=2))
    steps = loader.steps(0)
    next(steps)
    pids = [process.pid for process in loader._open[0]._processes]
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    for _ in range(40):
        next(steps)
    print(*pids, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_workers_outlive_the_signals_that_ask_to_save_and_die_with_their_parent() -> None:
    script = textwrap.dedent(WORKER_SCRIPT)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@given(samples=st.integers(1, 50), batch=st.integers(1, 12), world=st.integers(1, 5), limit=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_evaluation_visits_each_held_out_sample_once_and_gives_each_rank_as_many_batches(
    samples: int, batch: int, world: int, limit: int
) -> None:
    data = numbers(samples)
    ranks = [
        list(evaluation_batches(Fetcher(data, SEED), batch, RankInfo(rank, world), "cpu", limit))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [int(i) for batches in ranks for m in batches if m.real for i in m.batch["id"]]
    assert sorted(seen) == list(range(min(samples, limit)))


class FarAway(ArrayDataset):
    """A dataset that notes what it is asked to fetch."""

    sample_bytes = 1e6
    cache_bytes = 10**9

    def __init__(self, samples: int) -> None:
        super().__init__({"id": np.arange(samples)})
        self.wanted: list[int] = []

    def prefetch(self, ids: Ids) -> list[Future[None]]:
        self.wanted += ids.tolist()
        return []


def test_what_an_evaluation_needs_from_a_store_is_asked_for_ahead_and_no_further_than_allowed() -> None:
    data = FarAway(60)
    batches = evaluation_batches(Fetcher(data, SEED), 5, RankInfo(1, 2), "cpu", None, ahead_mb=9)
    mine = [*range(5, 10), *range(15, 20), *range(25, 30), *range(35, 40), *range(45, 50), *range(55, 60)]
    first = next(batches)
    until(lambda: len(data.wanted) == 15)  # 5 are used, and 9 or a batch more may be asked for
    assert first.ids.tolist() == mine[:5]
    assert [int(i) for batch in batches for i in batch.ids] == mine[5:]
    assert data.wanted == mine[: len(data.wanted)]


def test_an_evaluation_that_is_cut_short_leaves_no_thread_behind() -> None:
    batches = evaluation_batches(Fetcher(FarAway(60), SEED), 5, RankInfo(), "cpu", None, ahead_mb=9)
    next(batches)
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name == "everstep-lookahead"]


def test_wrong_sizes_are_refused_with_their_key() -> None:
    order = SampleOrder(SAMPLES, 4, 0)
    with pytest.raises(ConfigError, match="micro_batch=0"):
        Loader(Fetcher(numbers(), SEED), order, 0, RankInfo(), "cpu")
    with pytest.raises(ValueError, match=r"loader\.workers=-1"):
        LoaderConfig(workers=-1)
    with pytest.raises(DataError, match="37 samples"):
        Loader(Fetcher(numbers(36), SEED), order, 2, RankInfo(), "cpu")
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluation_batches(Fetcher(numbers(0), SEED), 2, RankInfo(), "cpu", None)
    with pytest.raises(ConfigError, match=r"evaluate\.batch=0"):
        evaluation_batches(Fetcher(numbers(), SEED), 0, RankInfo(), "cpu", None)


class Broken(ArrayDataset):
    def take(self, ids: Ids) -> Columns:
        if 7 in ids.tolist():
            raise DataError("sample 7 is gone")
        return super().take(ids)


def test_an_error_in_a_thread_comes_at_its_place_and_close_ends_the_threads() -> None:
    broken = Broken({"x": np.arange(SAMPLES)})
    order = SampleOrder(SAMPLES, 1, 0, shuffle=False)
    loader = Loader(Fetcher(broken, SEED), order, 1, RankInfo(), "cpu", LoaderConfig(workers=3, worker=Worker.thread))
    steps = loader.steps(0)
    assert [next(steps)[0].ids.tolist() for _ in range(7)] == [[n] for n in range(7)]
    with pytest.raises(DataError, match="sample 7 is gone"):
        next(steps)
    loader.close()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("everstep-worker") for thread in threading.enumerate()):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("gb", [4e-6, 1e-3])
@pytest.mark.parametrize(("prefetch", "workers"), [(0, 0), (2, 0), (2, 3)])
def test_no_cache_size_changes_what_is_read_from_a_store(
    tmp_path: Path, gb: float, prefetch: int, workers: int
) -> None:
    columns = {**numbered(60), "text": ["x" * (n % 5) for n in range(60)]}
    url = f"memory://cached/{tmp_path.name}"
    write_dataset(tmp_path / "local", [7, 20, 1, 12, 20], columns)
    write_dataset(url, [7, 20, 1, 12, 20], columns)
    local = ArrowDataset(str(tmp_path / "local"))
    remote = ArrowDataset(url, cache=lambda: ShardCache(str(tmp_path / "cache"), int(gb * 1e9)))
    order = SampleOrder([OrderSource(local.shard_rows)], 6, seed=2, window=2)
    expected = taken(Loader(Fetcher(local, SEED, collate=Pad()), order, 2, RankInfo(1, 3), "cpu", ON_DEMAND), 4, 25)
    loader = Loader(
        Fetcher(remote, SEED, collate=Pad()),
        order,
        2,
        RankInfo(1, 3),
        "cpu",
        LoaderConfig(prefetch=prefetch, workers=workers),
    )
    assert as_values(taken(loader, 4, 25)) == as_values(expected)

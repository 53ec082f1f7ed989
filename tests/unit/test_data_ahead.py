"""What a run will need from a store is on its way before it is needed, and nobody waits for what others need."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from everstep.errors import DataError
from everstep.trainer.data import open_shards
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.data.workers import Lookahead
from support import shard_datasets
from support.processes import until

ROWS = 4
Read = Callable[[str, int, int], bytes]


@pytest.fixture
def remote(tmp_path: Path) -> ArrowDataset:
    """Four shards in a store."""
    url = f"memory://ahead/{tmp_path.name}"
    shard_datasets.write_dataset(url, [ROWS] * 4, shard_datasets.numbered(4 * ROWS))
    return ArrowDataset(url, cache=lambda: ShardCache(str(tmp_path / "cache"), 10**9))


def taken(data: ArrowDataset, *ids: int) -> list[int]:
    return data.take(np.array(ids))["id"].tolist()  # type: ignore[union-attr]


def behind(data: ArrowDataset, monkeypatch: pytest.MonkeyPatch, gate: Callable[[str], object]) -> None:
    """Let each request to the store pass `gate` first."""
    storage = data._shards._storage
    read: Read = storage.read_range  # type: ignore[assignment]

    def read_range(path: str, start: int, stop: int) -> bytes:
        gate(path)
        return read(path, start, stop)

    monkeypatch.setattr(storage, "read_range", read_range)


def test_a_batch_asks_for_all_its_shards_at_once(remote: ArrowDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4, timeout=20)  # breaks unless four requests are on their way at one time
    behind(remote, monkeypatch, lambda path: together.wait())
    assert taken(remote, 15, 0, 9, 4) == [15, 0, 9, 4]


def test_who_has_its_samples_does_not_wait_for_a_shard_that_another_needs(
    remote: ArrowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, sent = threading.Event(), threading.Event()
    assert taken(remote, 1) == [1]
    behind(remote, monkeypatch, lambda path: (asked.set(), sent.wait(20)))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(taken, remote, 7)
        assert asked.wait(20)
        assert taken(remote, 2, 3) == [2, 3]
        assert not other.done()
        sent.set()
        assert other.result(20) == [7]


def test_a_shard_that_another_closes_on_its_way_is_asked_for_again(
    remote: ArrowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = remote._shards.cache.crew  # type: ignore[union-attr]
    fetch, first = crew.fetch, itertools.count()

    def cancelled(pieces: object, urgent: bool) -> list[Future[None]]:
        if next(first):
            return fetch(pieces, urgent)  # type: ignore[arg-type]
        future: Future[None] = Future()
        future.set_exception(CancelledError())
        return [future]

    monkeypatch.setattr(crew, "fetch", cancelled)
    assert taken(remote, 5, 6) == [5, 6]


def test_a_process_that_may_open_few_files_looks_ahead_at_many_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_shards, "_file_limit", lambda: 200)
    url, sent = f"memory://ahead/{tmp_path.name}", threading.Event()
    shard_datasets.write_dataset(url, [2] * 120, shard_datasets.numbered(240))
    data = ArrowDataset(url, cache=lambda: ShardCache(str(tmp_path / "cache"), 10**9, parallel=1))
    behind(data, monkeypatch, lambda path: sent.wait(20))
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, 240, 8):
        data.prefetch(np.arange(start, start + 8))
    assert len(os.listdir("/proc/self/fd")) - before < 3 * 25 + 10
    sent.set()
    assert taken(data, *range(240)) == list(range(240))


class Wanted:
    """A dataset that has to be asked three times: its second answer depends on what the first one brought."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.coming: list[Future[None]] = []

    def __call__(self, ids: Ids) -> list[Future[None]]:
        sample = int(ids[0])
        answer = [Future[None]()] if self.asked.count(sample) < 2 else []
        self.coming += answer
        self.asked.append(sample)
        return answer


def ahead(wanted: Wanted, samples: int) -> Lookahead:
    return Lookahead(wanted, (np.array([sample]) for sample in itertools.count()), samples)


def test_what_is_known_to_be_needed_only_when_something_has_come_is_asked_for_then() -> None:
    wanted = Wanted()
    lookahead = ahead(wanted, 3)
    until(lambda: wanted.asked == [0, 1, 2])  # those after it do not wait until the first is all there
    wanted.coming[0].set_result(None)
    until(lambda: wanted.asked == [0, 1, 2, 0])
    wanted.coming[3].set_result(None)
    until(lambda: wanted.asked == [0, 1, 2, 0, 0])
    wanted.coming[1].set_result(None)
    until(lambda: wanted.asked == [0, 1, 2, 0, 0, 1])
    wanted.coming[2].set_exception(DataError("part 0 of shard 2 is damaged"))  # ends it; who uses the sample tells
    wanted.coming[4].set_result(None)
    until(lambda: not lookahead._thread.is_alive())
    assert wanted.asked == [0, 1, 2, 0, 0, 1, 1]


def test_what_the_last_samples_need_is_asked_for_to_the_end() -> None:
    wanted = Wanted()
    lookahead = Lookahead(wanted, iter([np.array([0])]), 9)
    until(lambda: wanted.asked == [0])
    wanted.coming[0].set_result(None)
    until(lambda: wanted.asked == [0, 0])
    wanted.coming[1].set_result(None)
    until(lambda: wanted.asked == [0, 0, 0])
    lookahead.close()


def test_a_shard_that_was_closed_meanwhile_does_not_end_the_look_ahead() -> None:
    wanted = Wanted()
    lookahead = ahead(wanted, 1)
    until(lambda: wanted.asked == [0])
    wanted.coming[0].set_exception(CancelledError())
    until(lambda: wanted.asked == [0, 0])
    wanted.coming[1].set_result(None)
    until(lambda: wanted.asked == [0, 0, 0])
    lookahead.used(1)
    until(lambda: wanted.asked == [0, 0, 0, 1])
    wanted.coming[2].set_exception(DataError("gone"))
    lookahead.close()


def test_it_is_woken_when_there_is_something_to_ask_and_asks_no_further() -> None:
    asked: list[int] = []
    lookahead = Lookahead(lambda ids: asked.append(int(ids[0])) or (), map(np.atleast_1d, itertools.count()), ahead=4)
    until(lambda: asked == [0, 1, 2, 3])
    for used in range(1, 50):
        lookahead.used(1)
        until(lambda used=used: asked == list(range(used + 4)))  # type: ignore[misc]
    lookahead.used(7)
    until(lambda: asked == list(range(49 + 7 + 4)))
    lookahead.close()

"""The cache of remote shards in one process; its store is a folder that counts, waits and damages as it is told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from everstep.dataset.index import PART_BYTES, Shard, part_digest
from everstep.errors import ConfigError, DataError, StorageError
from everstep.storage import Buffer, LocalStorage
from everstep.trainer.data.cache import CachedShard, ShardCache, downloads, files
from support.processes import until

LARGE = 10**10


class Store(LocalStorage):
    """A folder that is taken for a store; `on_range` sees each range before it is given, and may change it."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int]] = []
        self.on_range: Callable[[int, bytes], bytes] = lambda part, data: data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        self.ranges.append((path, start // PART_BYTES))
        return self.on_range(start // PART_BYTES, super().read_range(path, start, stop))

    @property
    def parts(self) -> list[int]:
        return [part for _, part in self.ranges]

    def shard(self, name: str, parts: float) -> Shard:
        """A new shard of so many parts; each of them begins with random bytes."""
        data = bytearray(int(parts * PART_BYTES))
        for start in range(0, len(data), PART_BYTES):
            data[start : start + 16] = f"{name:>8}{start:8}".encode()
        self.write(name, bytes(data))
        digests = [part_digest(memoryview(data)[at : at + PART_BYTES]) for at in range(0, len(data), PART_BYTES)]
        return Shard(name, 1, len(data), tuple(digests))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def every(shard: Shard) -> np.ndarray:
    return np.arange(len(shard.parts))


def right(cached: CachedShard, shard: Shard, parts: object = None) -> bool:
    """Whether the bytes of some parts (default: of all) are those of the index."""
    content = np.memmap(cached.path, np.uint8, "r")
    chosen = every(shard) if parts is None else np.asarray(parts)
    return all(part_digest(content[p * PART_BYTES : (p + 1) * PART_BYTES].data) == shard.parts[p] for p in chosen)


def close(cached: CachedShard) -> None:
    """Close, and wait until a thread that has just delivered its last part lets go of the file."""
    cached.close()

    def free() -> bool:
        with open(Path(cached.path).with_suffix(".have"), "r+b") as have, contextlib.suppress(BlockingIOError):
            fcntl.flock(have, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    until(free)


def on_disk(folder: str) -> int:
    return sum(file.stat().st_blocks * 512 for file in Path(folder, "shards").iterdir() if file.suffix != ".have")


# --------------------------------------------------------------------------------------------------- parts


def test_what_is_needed_is_downloaded_and_nothing_else(store: Store, folder: str) -> None:
    shard = store.shard("a", 4.5)
    cached = ShardCache(folder, LARGE).open(store, shard)
    cached.need(np.array([1, 4]))
    assert sorted(store.parts) == [1, 4]
    assert right(cached, shard, [1, 4])
    assert cached.absent(every(shard)).tolist() == [0, 2, 3]
    assert os.path.getsize(cached.path) == shard.bytes
    assert on_disk(folder) < 2 * PART_BYTES
    assert not cached.complete


def test_what_is_here_is_not_downloaded_again_by_anyone(store: Store, folder: str) -> None:
    shard = store.shard("a", 3)
    first = ShardCache(folder, LARGE)
    first.open(store, shard).need(every(shard))
    for cache in (first, ShardCache(folder, LARGE), pickle.loads(pickle.dumps(first))):
        again = cache.open(store, shard)
        assert again.complete
        assert again.absent(every(shard)).size == 0
        again.need(every(shard))
        assert right(again, shard)
    assert sorted(store.parts) == [0, 1, 2]
    assert first.stats.downloads == 3
    assert first.stats.bytes == shard.bytes


def test_a_shard_of_no_bytes_is_complete(store: Store, folder: str) -> None:
    cached = ShardCache(folder, LARGE).open(store, store.shard("a", 0))
    assert cached.complete
    cached.need(np.arange(0))


def test_what_is_wanted_comes_while_the_caller_goes_on(store: Store, folder: str) -> None:
    shard, gate = store.shard("a", 3), threading.Event()
    store.on_range = lambda part, data: data if gate.wait(20) else b""
    cached = ShardCache(folder, LARGE).open(store, shard)
    futures = cached.want(every(shard))
    assert not any(future.done() for future in futures)
    gate.set()
    for future in futures:
        future.result(20)
    assert cached.complete
    assert right(cached, shard)


def test_a_part_that_is_being_written_has_its_room_and_keeps_nobody_from_opening_another_shard(
    store: Store, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = store.shard("slow", 1), store.shard("other", 1)
    begun, gate, write = threading.Event(), threading.Event(), files.ShardFiles.write

    def wait(self: files.ShardFiles, part: int, data: Buffer) -> None:
        begun.set()
        gate.wait(20)
        write(self, part, data)

    monkeypatch.setattr(files.ShardFiles, "write", wait)
    cache = ShardCache(folder, LARGE)
    cached = cache.open(store, slow)
    (future,) = cached.want(every(slow))
    assert begun.wait(20)
    try:
        assert on_disk(folder) >= PART_BYTES
        assert not cached.complete
        ThreadPoolExecutor(1).submit(cache.open, store, other).result(10)
    finally:
        gate.set()
    future.result(20)
    assert right(cached, slow)


def test_many_who_need_the_same_wait_for_one_download(store: Store, folder: str) -> None:
    shard = store.shard("a", 5)
    caches = [ShardCache(folder, LARGE, parallel=2) for _ in range(4)]

    def read(cache: ShardCache) -> bool:
        cached = cache.open(store, shard)
        cached.want(every(shard))
        cached.need(every(shard)[::-1])
        return right(cached, shard)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, caches * 4))
    assert sorted(store.parts) == [0, 1, 2, 3, 4]


def test_what_is_needed_overtakes_what_is_wanted(store: Store, folder: str) -> None:
    shard, gate = store.shard("a", 6), threading.Event()
    store.on_range = lambda part, data: data if part or gate.wait(20) else b""
    cached = ShardCache(folder, LARGE, parallel=1).open(store, shard)
    cached.want(every(shard))
    until(lambda: store.parts == [0])
    thread = threading.Thread(target=cached.need, args=(np.array([4, 5]),))
    thread.start()
    until(lambda: sum(job.urgent for job in cached._cache.crew._jobs.values()) == 2)
    gate.set()
    thread.join(20)
    cached.need(every(shard))
    assert store.parts == [0, 4, 5, 1, 2, 3]


def test_closing_leaves_out_what_was_wanted_and_has_not_begun(store: Store, folder: str) -> None:
    shard, gate = store.shard("a", 4), threading.Event()
    store.on_range = lambda part, data: data if gate.wait(20) else b""
    cache = ShardCache(folder, LARGE, parallel=1)
    cached = cache.open(store, shard)
    futures = cached.want(every(shard))
    until(lambda: store.parts == [0])
    cached.close()
    gate.set()
    futures[0].result(20)
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(20)
    assert cache.open(store, shard).absent(every(shard)).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="was closed"):
        cached.need(every(shard))


def test_closing_by_one_does_not_disturb_another_who_needs_the_same(store: Store, folder: str) -> None:
    shard, gate = store.shard("a", 4), threading.Event()
    store.on_range = lambda part, data: data if gate.wait(20) else b""
    cache = ShardCache(folder, LARGE, parallel=1)
    first, second = cache.open(store, shard), cache.open(store, shard)
    first.want(every(shard))
    until(lambda: store.parts == [0])
    thread = threading.Thread(target=second.need, args=(every(shard),))
    thread.start()
    until(lambda: all(job.urgent for job in cache.crew._jobs.values()))
    first.close()
    gate.set()
    thread.join(20)
    assert second.complete
    assert right(second, shard)
    assert sorted(store.parts) == [0, 1, 2, 3]


def test_a_forked_child_goes_on_with_threads_of_its_own(store: Store, folder: str) -> None:
    shard = store.shard("a", 4)
    cached = ShardCache(folder, LARGE).open(store, shard)
    cached.need(np.array([0]))
    pid = os.fork()
    if pid == 0:
        cached.need(np.array([0, 1]))
        os._exit(0 if right(cached, shard, [0, 1]) and store.parts == [0, 1] else 1)
    ended: list[int] = []
    until(lambda: ended.extend(os.waitpid(pid, os.WNOHANG)) or ended[-2] != 0)
    assert ended[-1] == 0
    cached.need(every(shard))
    assert sorted(store.parts) == [0, 2, 3]


# --------------------------------------------------------------------------------------------------- damage


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("change", [flipped, lambda data: data[:-1], lambda data: b""])
def test_an_answer_that_was_damaged_on_its_way_is_asked_for_again(
    store: Store, folder: str, change: Callable[[bytes], bytes]
) -> None:
    shard, cache = store.shard("a", 2), ShardCache(folder, LARGE)
    store.on_range = lambda part, data: change(data) if store.parts.count(part) <= 2 else data
    cached = cache.open(store, shard)
    cached.need(every(shard))
    assert right(cached, shard)
    assert cache.stats.retries == 4
    assert cache.stats.downloads == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [(flipped, "its digest is not that of the index"), (lambda data: data[:9], "9 bytes came in place of 4194304")],
)
def test_a_part_that_stays_damaged_is_named(
    store: Store, folder: str, change: Callable[[bytes], bytes], why: str
) -> None:
    shard = store.shard("a", 2)
    store.on_range = lambda part, data: change(data) if part else data
    cached = ShardCache(folder, LARGE).open(store, shard)
    cached.need(np.array([0]))
    with pytest.raises(DataError) as error:
        cached.need(every(shard))
    assert str(error.value) == (
        f"part 1 of shard {store.url}/a is damaged: {why}, however often it is downloaded; "
        f"`everstep data verify {store.url}` tells which shards to upload again"
    )
    assert cached.absent(every(shard)).tolist() == [1]
    store.on_range = lambda part, data: data
    cached.need(every(shard))
    assert right(cached, shard)


def test_a_shard_that_is_missing_is_named_at_once(store: Store, folder: str) -> None:
    shard, cache = store.shard("a", 2), ShardCache(folder, LARGE)
    store.delete("a")
    with pytest.raises(DataError, match=f"shard {store.url}/a is missing; copy it back"):
        cache.open(store, shard).need(every(shard))
    assert cache.stats.retries == 0


def test_a_store_that_fails_says_so(store: Store, folder: str) -> None:
    def refuse(part: int, data: bytes) -> bytes:
        raise StorageError("gave up after 6 tries")

    shard, store.on_range = store.shard("a", 2), refuse
    with pytest.raises(StorageError, match="gave up after 6 tries"):
        ShardCache(folder, LARGE).open(store, shard).need(every(shard))


# --------------------------------------------------------------------------------------------------- slow requests


def test_of_a_slow_request_and_a_second_one_the_first_answer_counts(
    store: Store, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "FIRST_HEDGE_S", 0.05)
    shard, gate, cache = store.shard("a", 3), threading.Event(), ShardCache(folder, LARGE, parallel=2)
    # The second request for part 0 is damaged besides, the third right; the first comes last, when all is done.
    store.on_range = lambda part, data: (
        data if part or store.parts.count(0) > 2 else flipped(data) if store.parts.count(0) == 2 else late(data)
    )

    def late(data: bytes) -> bytes:
        gate.wait(20)
        return flipped(data)

    cached = cache.open(store, shard)
    cached.need(every(shard))
    assert right(cached, shard)
    assert cache.stats.hedges == 1
    assert store.parts.count(0) == 3
    gate.set()
    until(lambda: not cache.crew._requests)
    assert right(cached, shard)


def test_a_slow_line_is_not_filled_with_second_requests(
    store: Store, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "FIRST_HEDGE_S", 0.01)
    shard, gate, cache = store.shard("a", 8), threading.Event(), ShardCache(folder, LARGE)
    store.on_range = lambda part, data: data if gate.wait(20) else b""
    cached = cache.open(store, shard)
    cached.want(every(shard))
    until(lambda: cache.stats.hedges >= 2)
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 0.3)
    assert cache.stats.hedges == 2
    gate.set()
    cached.need(every(shard))
    assert right(cached, shard)


def test_an_error_of_one_request_waits_for_the_other(
    store: Store, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "FIRST_HEDGE_S", 0.05)
    shard, failed = store.shard("a", 1), threading.Event()

    def answer(part: int, data: bytes) -> bytes:
        if len(store.parts) == 2:
            failed.set()
            raise StorageError("no answer")
        failed.wait(20)
        return data

    store.on_range = answer
    cached = ShardCache(folder, LARGE).open(store, shard)
    cached.need(every(shard))
    assert right(cached, shard)


def test_a_process_that_hangs_with_its_claim_is_not_waited_for_without_end(
    store: Store, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "TAKE_OVER_S", 0.05)
    monkeypatch.setattr(downloads, "FIRST_HEDGE_S", 0.01)
    shard = store.shard("a", 2)
    other = ShardCache(folder, LARGE)
    other.open(store, shard)
    assert other.folder.claim(shard.digest, 1)
    cached = ShardCache(folder, LARGE).open(store, shard)
    cached.need(every(shard))
    assert right(cached, shard)
    other.folder.release(shard.digest, 1)


# --------------------------------------------------------------------------------------------------- the bound


def test_the_least_recently_used_goes_first_and_what_is_open_stays(store: Store, folder: str) -> None:
    shards = [store.shard(name, 2) for name in "abcdef"]
    cache = ShardCache(folder, 8 * PART_BYTES)
    kept = cache.open(store, shards[0])
    kept.need(every(shards[0]))
    for shard in shards[1:4]:
        cached = cache.open(store, shard)
        cached.need(every(shard))
        close(cached)
    close(cache.open(store, shards[1]))
    cache.open(store, shards[4]).need(every(shards[4]))
    names = {shard.file: Path(folder, "shards", f"{shard.digest}.arrow").exists() for shard in shards}
    assert names == {"a": True, "b": True, "c": False, "d": True, "e": True, "f": False}
    assert cache.stats.evictions == 1


@pytest.mark.parametrize("seed", range(4))
def test_within_any_limit_the_content_is_right(store: Store, folder: str, seed: int) -> None:
    rng = random.Random(seed)
    shards = [store.shard(str(number), rng.choice([0.5, 1, 2.2, 3])) for number in range(10)]
    limit = rng.randrange(6, 12) * PART_BYTES
    cache, other = ShardCache(folder, limit, parallel=2), ShardCache(folder, 2 * limit)
    held: list[CachedShard] = []
    for _ in range(60):
        shard = rng.choice(shards)
        cached = rng.choice([cache, cache, other]).open(store, shard)
        parts = np.array(rng.sample(range(len(shard.parts)), rng.randint(1, len(shard.parts))))
        cached.need(parts)
        assert right(cached, shard, parts)
        assert on_disk(folder) <= 2 * limit
        held.append(cached)
        if len(held) > 2:
            held.pop(rng.randrange(2)).close()
    assert cache.stats.evictions


def test_a_limit_below_what_is_open_is_passed_with_one_warning(
    store: Store, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    shards = [store.shard(name, 2) for name in "abc"]
    cache = ShardCache(folder, 3 * PART_BYTES)
    opened = [cache.open(store, shard) for shard in shards]
    for cached, shard in zip(opened, shards, strict=True):
        cached.need(every(shard))
    assert all(right(cached, shard) for cached, shard in zip(opened, shards, strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        f"the cache {folder} holds 0.0168 GB, over its limit of 0.0126 GB, and all are open; raise loader.cache_gb"
    ]


def test_a_map_outlives_the_eviction_and_a_reopened_shard_starts_clean(store: Store, folder: str) -> None:
    first, second = store.shard("a", 2), store.shard("b", 2)
    cache = ShardCache(folder, 3 * PART_BYTES)
    cached = cache.open(store, first)
    cached.need(every(first))
    content = np.memmap(cached.path, np.uint8, "r")
    close(cached)
    cache.open(store, second).need(every(second))
    assert not os.path.exists(cached.path)
    assert part_digest(content[:PART_BYTES].data) == first.parts[0]
    again = cache.open(store, first)
    assert again.absent(every(first)).tolist() == [0, 1]
    again.need(every(first))
    assert right(again, first)


def test_a_limit_of_nothing_is_refused_with_its_key(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"a cache of 0 bytes holds nothing; loader\.cache_gb must be > 0"):
        ShardCache(folder, 0)


# --------------------------------------------------------------------------------------------------- the folder


def test_the_folder_is_the_users_own(store: Store, folder: str) -> None:
    ShardCache(folder, LARGE).open(store, store.shard("a", 1)).need(np.array([0]))
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in Path(folder, "shards").iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["a file", "a file/below"])
def test_a_folder_that_cannot_be_is_one_line(store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write to the cache .*; set loader.cache to a folder that you may"):
        ShardCache(str(tmp_path / name), LARGE).open(store, store.shard("a", 1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_folder_of_another_user_is_refused_with_its_key(store: Store, tmp_path: Path) -> None:
    folder, shard = tmp_path / "cache", store.shard("a", 1)
    ShardCache(str(folder), LARGE).open(store, shard)
    said = tmp_path / "said"
    said.touch()
    said.chmod(0o666)
    pid = os.fork()
    if pid == 0:
        with said.open("w") as log:
            os.setuid(65534)
            try:
                ShardCache(str(folder), LARGE).open(store, shard)
            except StorageError as error:
                log.write(str(error))
        os._exit(0)
    os.waitpid(pid, 0)
    assert said.read_text() == (
        f"cannot write to the cache {folder}: Permission denied; set loader.cache to a folder that you may write to"
    )


def test_a_file_that_was_deleted_by_hand_is_begun_anew(store: Store, folder: str) -> None:
    shard, cache = store.shard("a", 2), ShardCache(folder, LARGE)
    before = cache.open(store, shard)
    before.need(every(shard))
    content = np.memmap(before.path, np.uint8, "r")
    Path(before.path).unlink()
    after = cache.open(store, shard)
    assert after.absent(every(shard)).tolist() == [0, 1]
    assert before.absent(every(shard)).size == 0
    after.need(every(shard))
    assert right(after, shard)
    assert part_digest(content[:PART_BYTES].data) == shard.parts[0]


def test_a_file_that_is_not_the_one_of_its_map_is_begun_anew(store: Store, folder: str) -> None:
    shard, cache = store.shard("a", 2), ShardCache(folder, LARGE)
    inflated, plain = cache.inflated(store, shard, twice), cache.open(store, shard)
    plain.need(np.array([0]))
    content = np.memmap(plain.path, np.uint8, "r")
    for cached in (plain, inflated):
        # As a kill leaves it between the file's new name and the map's stamp.
        other = Path(f"{cached.path}.other")
        other.write_bytes(bytes(os.path.getsize(cached.path)))
        other.replace(cached.path)
    again = cache.open(store, shard)
    assert again.absent(every(shard)).tolist() == [0, 1]
    assert plain.absent(every(shard)).tolist() == [1]
    plain.need(np.array([1]))  # who has the old file open goes on with that
    assert part_digest(content[PART_BYTES:].data) == shard.parts[1]
    assert again.absent(every(shard)).tolist() == [0, 1]
    again.need(every(shard))
    assert right(again, shard)
    assert Path(cache.inflated(store, shard, twice).path).read_bytes() == store.read("a") * 2


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_map_that_was_not_written_to_its_end_is_begun_anew(store: Store, folder: str, cut: int) -> None:
    shard = store.shard("a", 2)
    cached = ShardCache(folder, LARGE).open(store, shard)
    cached.need(every(shard))
    have = Path(cached.path).with_suffix(".have")
    have.write_bytes(have.read_bytes()[:cut])
    again = ShardCache(folder, LARGE).open(store, shard)
    again.need(every(shard))
    assert right(again, shard)


def test_after_a_power_cut_what_is_on_the_disk_is_verified_again(
    store: Store, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = store.shard("a", 4)
    cached = ShardCache(folder, LARGE).open(store, shard)
    cached.need(np.array([0, 1, 2]))
    with open(cached.path, "r+b") as file:  # the map was on the disk, the bytes of part 1 were not
        file.seek(PART_BYTES)
        file.write(bytes(PART_BYTES))
    cached.close()
    monkeypatch.setattr(files, "_boot", lambda: "another boot")
    again = ShardCache(folder, LARGE).open(store, shard)
    assert again.absent(every(shard)).tolist() == [0, 1, 2, 3]
    store.ranges.clear()
    again.need(every(shard))
    assert sorted(store.parts) == [1, 3]
    assert right(again, shard)


# --------------------------------------------------------------------------------------------------- compressed


def twice(source: str, target: str) -> None:
    Path(target).write_bytes(Path(source).read_bytes() * 2)


def test_a_compressed_shard_is_inflated_once_and_then_only_that_is_kept(store: Store, folder: str) -> None:
    shard, calls = store.shard("a", 1.5), []

    def inflate(source: str, target: str) -> None:
        calls.append(source)
        twice(source, target)

    caches = [ShardCache(folder, LARGE) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda cache: cache.inflated(store, shard, inflate), caches * 2))
    assert all(cached.complete and cached.absent(np.arange(9)).size == 0 for cached in opened)
    assert {Path(cached.path).read_bytes() for cached in opened} == {store.read("a") * 2}
    assert len(calls) == 1
    assert sorted(store.parts) == [0, 1]
    assert sorted(file.suffix for file in Path(folder, "shards").iterdir()) == [".arrow", ".have"]


def test_a_shard_that_cannot_be_inflated_is_tried_again_by_the_next(store: Store, folder: str) -> None:
    shard, cache = store.shard("a", 1), ShardCache(folder, LARGE)

    def broken(source: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise ValueError("not compressed at all")

    with pytest.raises(ValueError, match="not compressed at all"):
        cache.inflated(store, shard, broken)
    assert Path(cache.inflated(store, shard, twice).path).read_bytes() == store.read("a") * 2


def test_inflated_shards_are_bounded_too(store: Store, folder: str) -> None:
    cache = ShardCache(folder, 6 * PART_BYTES)
    for name in "abcdefgh":
        shard = store.shard(name, 1)
        cached = cache.inflated(store, shard, twice)
        assert Path(cached.path).read_bytes() == store.read(name) * 2
        cached.close()
        assert on_disk(folder) <= 6 * PART_BYTES

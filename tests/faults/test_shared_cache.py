"""The cache of remote shards among real processes, killed and starved, before a real S3 server that misbehaves."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

from everstep.dataset.index import PART_BYTES, Shard, part_digest
from everstep.errors import DataError, StorageError
from everstep.storage import open_storage
from everstep.trainer.data.cache import ShardCache
from support.fault_proxy import Proxy, fault_proxy
from support.processes import until
from support.small_disks import small_disk

pytestmark = pytest.mark.process

LARGE = 10**10
SHARDS, PARTS = 3, 3


@dataclass(frozen=True)
class Remote:
    """A dataset in the store, and the proxy through which it is read."""

    url: str
    shards: list[Shard]
    proxy: Proxy

    def gets(self) -> Counter[str]:
        """How often each part was asked for."""
        return Counter(f"{r.path} {r.range}" for r in self.proxy.requests if r.method == "GET" and r.range)


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[Proxy]:
    with fault_proxy(int(s3_server.rsplit(":", 1)[1])) as proxy:
        yield proxy


@pytest.fixture
def remote(s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Shards of 2.3 parts in a folder of their own."""
    import s3fs

    proxy.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    s3fs.S3FileSystem.clear_instance_cache()
    url = f"{s3}/{uuid.uuid4().hex}"
    store, shards = open_storage(url), []
    for number in range(SHARDS):
        data = np.random.default_rng(uuid.uuid4().int).bytes(int(2.3 * PART_BYTES))
        store.write(f"shard-{number}", data)
        digests = (part_digest(data[at : at + PART_BYTES]) for at in range(0, len(data), PART_BYTES))
        shards.append(Shard(f"shard-{number}", 1, len(data), tuple(digests)))
    return Remote(url, shards, proxy)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


class Reader:
    """A process that reads random parts, verifies what it sees, and writes how it went."""

    def __init__(self, remote: Remote, folder: str, seed: int, *, limit: int = LARGE, reads: int = 0) -> None:
        order = {"url": remote.url, "shards": [asdict(shard) for shard in remote.shards], "folder": folder,
                 "seed": seed, "limit": limit, "reads": reads}  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen([sys.executable, __file__, json.dumps(order)], stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, env=environment)  # fmt: skip

    def result(self) -> dict[str, int]:
        """Its counts, when all that it saw was right."""
        said, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, said
        counts: dict[str, int] = json.loads(said.splitlines()[-1])
        return counts

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def read_as(url: str, shards: list[Shard], folder: str, seed: int, limit: int, reads: int) -> None:
    """What a Reader does: every part once in some order or, with `reads`, that many random shards."""
    rng, store, cache = random.Random(seed), open_storage(url), ShardCache(folder, limit)
    chosen = [rng.choice(shards) for _ in range(reads)] or rng.sample(shards, len(shards))
    for shard in chosen:
        cached = cache.open(store, shard)
        content = np.memmap(cached.path, np.uint8, "r")
        parts = np.array(rng.sample(range(PARTS), rng.randint(1, PARTS) if reads else PARTS))
        cached.want(parts)
        for part in parts.tolist():
            cached.need(np.array([part]))
            if part_digest(content[part * PART_BYTES : (part + 1) * PART_BYTES].data) != shard.parts[part]:
                sys.exit(f"part {part} of {shard.file} is wrong")
        cached.close()
    print(json.dumps(asdict(cache.stats)))


def on_disk(folder: str) -> int:
    total = 0
    for file in Path(folder, "shards").glob("*.arrow"):
        try:
            total += file.stat().st_blocks * 512
        except FileNotFoundError:  # evicted between the two calls
            continue
    return total


# --------------------------------------------------------------------------------------------------- processes


def test_four_processes_at_once_download_each_part_once(remote: Remote, folder: str) -> None:
    remote.proxy.delay_s = 0.05
    readers = [Reader(remote, folder, seed) for seed in range(4)]
    counts = [reader.result() for reader in readers]
    assert sum(count["downloads"] for count in counts) == SHARDS * PARTS
    assert set(remote.gets().values()) == {1}
    assert len(remote.gets()) == SHARDS * PARTS


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_killed_while_it_downloads_hands_its_parts_to_another(remote: Remote, folder: str, seed: int) -> None:
    rng = random.Random(seed)
    remote.proxy.rate = 40e6
    survivor = None
    for round_number in range(2):
        begun = len(remote.gets())
        victim = Reader(remote, folder, rng.randrange(1000))
        until(lambda begun=begun: len(remote.gets()) > begun, 60)
        if round_number == 1:
            survivor = Reader(remote, folder, seed)
        deadline = time.monotonic() + rng.uniform(0, 0.5)
        until(lambda at=deadline: time.monotonic() > at)
        victim.kill()
    remote.proxy.rate = 0
    assert survivor is not None
    survivor.result()
    Reader(remote, folder, seed).result()


def test_a_bounded_cache_shared_with_different_limits_is_always_right(remote: Remote, folder: str) -> None:
    # Each of three readers has at most one shard of 2.3 parts open.
    limits = [7 * PART_BYTES, 7 * PART_BYTES, 8 * PART_BYTES]
    readers = [Reader(remote, folder, seed, limit=limit, reads=12) for seed, limit in enumerate(limits)]
    most = 0
    while any(reader.process.poll() is None for reader in readers):
        most = max(most, on_disk(folder) if os.path.isdir(folder) else 0)
        readers[0].process.poll()
    counts = [reader.result() for reader in readers]
    assert most <= 8 * PART_BYTES
    assert sum(count["downloads"] for count in counts) >= SHARDS


def test_more_data_than_the_limit_is_read_through_it(remote: Remote, folder: str) -> None:
    counts = Reader(remote, folder, 1, limit=3 * PART_BYTES, reads=20).result()
    assert counts["evictions"] > 0
    assert on_disk(folder) <= 3 * PART_BYTES


# --------------------------------------------------------------------------------------------------- the store


def need_all(remote: Remote, folder: str) -> ShardCache:
    cache, store = ShardCache(folder, LARGE), open_storage(remote.url)
    for shard in remote.shards:
        cached = cache.open(store, shard)
        cached.need(np.arange(PARTS))
        content = Path(cached.path).read_bytes()
        assert [part_digest(content[at : at + PART_BYTES]) for at in range(0, len(content), PART_BYTES)] == [
            *shard.parts
        ]
    return cache


def test_busy_answers_and_resets_are_tried_again(remote: Remote, folder: str) -> None:
    remote.proxy.fail(status=503, times=2, method="GET")
    remote.proxy.reset(after=100_000, times=2, method="GET")
    need_all(remote, folder)
    assert {"fail", "reset"} <= {request.fault for request in remote.proxy.requests}


def test_answers_damaged_on_their_way_are_asked_for_again(remote: Remote, folder: str) -> None:
    remote.proxy.corrupt(at=1_000_000, times=2, method="GET")
    remote.proxy.truncate(keep=1_000_000, times=2, method="GET")
    cache = need_all(remote, folder)
    assert cache.stats.retries == 4
    assert cache.stats.downloads == SHARDS * PARTS


def test_requests_that_are_never_answered_are_doubled(remote: Remote, folder: str) -> None:
    remote.proxy.hang(times=2, method="GET")
    began = time.monotonic()
    cache = need_all(remote, folder)
    assert cache.stats.hedges == 2
    assert time.monotonic() - began < 20


def test_a_late_answer_among_quick_ones_is_not_waited_for(remote: Remote, folder: str) -> None:
    need_all(remote, folder)
    cache = ShardCache(f"{folder}-2", LARGE)
    opened = [cache.open(open_storage(remote.url), shard) for shard in remote.shards]
    for cached in opened[:2]:
        cached.need(np.arange(PARTS))
    remote.proxy.slow(30, method="GET")
    began = time.monotonic()
    opened[2].need(np.arange(PARTS))
    assert cache.stats.hedges == 1
    assert time.monotonic() - began < 15


def test_a_part_that_the_store_holds_damaged_is_named(remote: Remote, folder: str) -> None:
    store, shard = open_storage(remote.url), remote.shards[1]
    data = bytearray(store.read(shard.file))
    data[PART_BYTES + 5] ^= 1
    store.write(shard.file, bytes(data))
    said = re.escape(f"part 1 of shard {remote.url}/shard-1 is damaged: its digest is not that of the index")
    with pytest.raises(DataError, match=f"{said}.*everstep data verify {remote.url}"):
        need_all(remote, folder)


@pytest.mark.parametrize("size", [PART_BYTES + 10, 2 * PART_BYTES, 0])
def test_a_truncated_shard_is_named(remote: Remote, folder: str, size: int) -> None:
    store, shard = open_storage(remote.url), remote.shards[1]
    store.write(shard.file, store.read(shard.file)[:size])
    with pytest.raises(DataError, match=f"shard {remote.url}/shard-1 is .*") as error:
        need_all(remote, folder)
    assert "\n" not in str(error.value)
    assert f"is {size} bytes where the index says {shard.bytes}" in str(error.value)


def test_a_missing_shard_is_named(remote: Remote, folder: str) -> None:
    open_storage(remote.url).delete("shard-2")
    with pytest.raises(DataError, match=f"shard {remote.url}/shard-2 is missing; copy it back or prepare"):
        need_all(remote, folder)


# --------------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "16m") as place:
        yield place


def test_on_a_disk_smaller_than_the_limit_reading_goes_on(remote: Remote, little_disk: Path) -> None:
    counts = Reader(remote, f"{little_disk}/cache", 1, reads=20).result()
    assert counts["evictions"] > 0


def test_an_answer_that_comes_late_takes_up_no_room_on_a_full_disk(remote: Remote, little_disk: Path) -> None:
    cache, store = ShardCache(f"{little_disk}/cache", LARGE), open_storage(remote.url)
    remote.proxy.hang(times=1, method="GET")
    for shard in remote.shards:
        cached = cache.open(store, shard)
        cached.need(np.arange(PARTS))
        cached.close()
    assert cache.crew._requests, "the request that hangs has ended, so nothing was tried"
    assert cache.stats.evictions > 0


def test_a_disk_that_is_full_of_open_shards_is_one_line(remote: Remote, little_disk: Path) -> None:
    cache, store = ShardCache(f"{little_disk}/cache", LARGE), open_storage(remote.url)
    opened = [cache.open(store, shard) for shard in remote.shards]
    opened[0].need(np.arange(PARTS))
    with pytest.raises(StorageError) as error:
        opened[1].need(np.arange(PARTS))
    assert str(error.value) == (
        f"cannot write to the cache {little_disk}/cache: No space left on device; "
        "set loader.cache to a folder with more room"
    )
    opened[0].close()
    until(lambda: not cache.crew._requests)
    opened[1].need(np.arange(PARTS))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    given["shards"] = [Shard(**{**shard, "parts": tuple(shard["parts"])}) for shard in given["shards"]]
    read_as(**given)

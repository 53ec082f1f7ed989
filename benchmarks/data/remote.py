"""Reading from an S3 server on this machine with latency added, beside reading the same shards from the disk.

The server and the reader share this machine's cores: moto takes most of them, nginx, which can only be read from, a
tenth of one. A step of `--step-ms` stands for a device that computes while the host waits; with 0 the figures are of
the loader alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import FailedError, run
from benchmarks.data.source import BLOCK, VOCABULARY
from benchmarks.store import CREDENTIALS, file_server, s3_server
from benchmarks.table import machine, markdown, spread

BUCKET, DATASET = "bench", "tokens"
SERVERS = ("moto", "nginx")
ROWS = 2000
"""Samples a shard, of a little less than 4 MiB: small, since moto reads a whole object for each range of it."""
WINDOW, BATCH = 8, 32
CASES = ("local", "cold", "bounded", "warm")
"""Of the disk; of the store with an empty cache, with one of a fifth of the dataset, and with one that has all."""
HEAD = ("reading", "n", "step, ms", "samples/s", "/ local", "/ cold", "first batch, ms", "downloaded, MB")


def measure(server: str, size_mb: int, rounds: int, delay_ms: float, step_ms: float, folder: Path) -> None:
    """Print one table."""
    shards = size_mb * 2**20 // (ROWS * BLOCK * 2)
    local = folder / "remote" / f"{server}-{size_mb}" / BUCKET / DATASET
    _write(str(local), shards)
    seen: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with _store(server, local.parent.parent, delay_ms / 1e3) as environment:
        os.environ.update(environment)
        _write(f"s3://{BUCKET}/{DATASET}", shards)
        for number in range(rounds):
            _fill_memory(folder / f"memory-{number}")
            for file in local.iterdir():
                file.read_bytes()  # the system may have let go of it
            cache = folder / f"cache-{number}"
            for case in CASES:
                seen[case].append(_once(case, local, cache, size_mb, step_ms))
            print(f"round {number + 1} of {rounds}", flush=True)
    shape = f"{shards} shards of 4 MiB, window {WINDOW}, batches of {BATCH}, one epoch"
    print(f"\n{shape}; {server}, {delay_ms:g} ms; {machine()}\n")
    print(markdown(HEAD, [_row(case, seen, step_ms) for case in CASES]))


def _fill_memory(path: Path) -> None:
    """Leave no memory unused, as on a machine that has been up for long, by reading a file with nothing in it.

    Memory that a virtual machine has not used lately may cost a fault in its host for each page: 3 s a GB were seen,
    ten times what a download costs, and only a cache that is being written has to pay it.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemFree"))
    with path.open("w+b", buffering=0) as file:
        file.truncate(free_kib << 10)
        while file.read(1 << 20):
            pass


def _row(case: str, seen: dict[str, list[dict[str, float]]], step_ms: float) -> list[str]:
    def ratios(to: str) -> list[float]:
        return [one["rate"] / other["rate"] for one, other in zip(seen[case], seen[to], strict=True)]

    ones = seen[case]
    return [
        case, str(len(ones)), f"{step_ms:g}", spread([one["rate"] for one in ones]), spread(ratios("local")),
        spread(ratios("cold")), spread([1e3 * one["first_s"] for one in ones]),
        spread([one["downloaded"] / 1e6 for one in ones]),
    ]  # fmt: skip


def _once(case: str, local: Path, cache: Path, size_mb: int, step_ms: float) -> dict[str, float]:
    bound = size_mb / 5 if case == "bounded" else 10 * size_mb
    settings = {
        "URL": local if case == "local" else f"s3://{BUCKET}/{DATASET}",
        "CACHE": f"{cache}-bounded" if case == "bounded" else cache,
        "CACHE_BYTES": int(bound * 2**20),
        "STEP_S": step_ms / 1e3,
    }
    try:
        return run([sys.executable, "-m", "benchmarks.data.remote"], settings)
    except FailedError as error:
        raise SystemExit(f"{case}: {error}") from error


def _write(url: str, shards: int) -> None:
    from everstep.dataset.index import INDEX, ShardIndex
    from everstep.dataset.shard_format import columns_of, table_of, write_shard
    from everstep.storage import open_storage

    storage, written = open_storage(url), []
    if storage.exists(INDEX):
        return
    for number in range(shards):
        tokens = np.random.default_rng(number).integers(0, VOCABULARY, (ROWS, BLOCK), dtype=np.uint16)
        table = table_of({"tokens": tokens})
        written.append(write_shard(storage, f"shard-{number:05d}.arrow", table))
    ShardIndex(columns_of(table.schema), tuple(written)).write(url)


@contextlib.contextmanager
def _store(server: str, folder: Path, delay_s: float) -> Iterator[dict[str, str]]:
    """A store with latency, of moto with an empty bucket, of nginx with what lies in `folder`; how it is found."""
    if server == "nginx":
        with file_server(folder, delay_s) as url:
            yield {"AWS_ENDPOINT_URL": url, **CREDENTIALS}
        return
    from tests.support.fault_proxy import fault_proxy

    with s3_server(BUCKET) as url, fault_proxy(int(url.rsplit(":", 1)[1])) as proxy:
        proxy.delay_s = delay_s
        yield {"AWS_ENDPOINT_URL": proxy.url, **CREDENTIALS}


def _child() -> None:
    from everstep.config import LoaderConfig
    from everstep.rank_env import RankInfo
    from everstep.trainer.data.arrow_reader import ArrowDataset
    from everstep.trainer.data.cache import ShardCache
    from everstep.trainer.data.fetcher import Fetcher
    from everstep.trainer.data.loader import Loader
    from everstep.trainer.data.ordering.order import OrderSource, SampleOrder

    settings = {name: os.environ[f"BENCH_{name}"] for name in ("URL", "CACHE", "CACHE_BYTES", "STEP_S")}
    step_s = float(settings["STEP_S"])
    cache = ShardCache(settings["CACHE"], int(settings["CACHE_BYTES"]))
    start = time.perf_counter()
    dataset = ArrowDataset(settings["URL"], cast={"tokens": "int64"}, cache=lambda: cache)
    order = SampleOrder([OrderSource(dataset.shard_rows)], BATCH, seed=0, window=WINDOW)
    loader = Loader(Fetcher(dataset, 0), order, BATCH, RankInfo(), "cpu", LoaderConfig(prefetch=2))
    steps = loader.steps(0)
    next(steps)
    first = time.perf_counter()
    count = len(dataset) // BATCH - 1
    for _ in islice(steps, count):
        if step_s:  # to sleep for no time takes 70 µs
            time.sleep(step_s)
    seen: dict[str, Any] = {"first_s": first - start, "rate": count * BATCH / (time.perf_counter() - first)}
    seen["downloaded"] = cache.stats.bytes
    Path(os.environ["BENCH_OUT"]).write_text(json.dumps(seen))
    os._exit(0)


if __name__ == "__main__":
    _child()

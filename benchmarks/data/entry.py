"""The time to the first batch, at the start of an epoch and in its middle, for data sets of very different sizes.

The dataset is synthetic and reads nothing, so what is measured is the loader and the order: whether they walk to their
place, or hold a table of the epoch. `table` is what a RandomSampler does: a permutation of the epoch, from which
batches are taken one after the other up to the place. Each figure is of a fresh process, imports not counted.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from itertools import islice
from pathlib import Path

from benchmarks.contest import FailedError, run
from benchmarks.table import machine, markdown, spread

SAMPLES = (10**6, 10**9)
BATCH = 256
PLACES = (("fresh", 0.0), ("middle", 0.4))
NAMES = ("everstep", "table")
LARGEST_TABLE = 10**7
HEAD = ("contestant", "samples", "n", "fresh, ms", "at 40 %, ms", "40 % / fresh", "max RSS, MB")


def measure(rounds: int) -> None:
    """Print one table."""
    cases = [(name, samples) for name in NAMES for samples in SAMPLES if name == "everstep" or samples <= LARGEST_TABLE]
    seen: dict[tuple[str, int], dict[str, list[float]]] = {
        case: {"fresh": [], "middle": [], "rss": []} for case in cases
    }
    for number in range(rounds):
        for name, samples in cases:
            for place, share in PLACES:
                one = _once(name, samples, int(samples * share) // BATCH)
                seen[name, samples][place].append(1e3 * one["first_s"])
                seen[name, samples]["rss"].append(one["rss_mb"])
        print(f"round {number + 1} of {rounds}", flush=True)
    print(f"\nthe first batch of {BATCH} samples; {machine()}\n")
    rows = [_row(name, samples, one) for (name, samples), one in seen.items()]
    rows += [_too_large(samples) for samples in SAMPLES if samples > LARGEST_TABLE]
    print(markdown(HEAD, rows))


def _row(name: str, samples: int, seen: dict[str, list[float]]) -> list[str]:
    ratios = [late / early for early, late in zip(seen["fresh"], seen["middle"], strict=True)]
    return [
        name, f"{samples:.0e}", str(len(ratios)), spread(seen["fresh"]), spread(seen["middle"]), spread(ratios),
        spread(seen["rss"], 4),
    ]  # fmt: skip


def _too_large(samples: int) -> list[str]:
    return ["table", f"{samples:.0e}", "0", f"would need {samples * 8 / 2**30:.0f} GiB", "–", "–", "–"]


def _once(name: str, samples: int, step: int) -> dict[str, float]:
    try:
        settings = {"NAME": name, "SAMPLES": samples, "STEP": step}
        return run([sys.executable, "-m", "benchmarks.data.entry"], settings)
    except FailedError as error:
        raise SystemExit(f"{name} with {samples} samples: {error}") from error


def _child() -> None:
    samples, step = int(os.environ["BENCH_SAMPLES"]), int(os.environ["BENCH_STEP"])
    first = {"everstep": _everstep, "table": _table}[os.environ["BENCH_NAME"]]
    seconds = first(samples, step)
    seen = {"first_s": seconds, "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    Path(os.environ["BENCH_OUT"]).write_text(json.dumps(seen))


def _everstep(samples: int, step: int) -> float:
    import torch

    from everstep.config import LoaderConfig
    from everstep.rank_env import RankInfo
    from everstep.trainer.data.columns import Columns
    from everstep.trainer.data.fetcher import Fetcher
    from everstep.trainer.data.loader import Loader
    from everstep.trainer.data.ordering.order import Ids, SampleOrder

    class Synthetic:
        digest = "0"

        def __len__(self) -> int:
            return samples

        def take(self, ids: Ids) -> Columns:
            return {"x": torch.from_numpy(ids)}

    start = time.perf_counter()
    order = SampleOrder(samples, BATCH, seed=0)
    loader = Loader(Fetcher(Synthetic(), seed=0), order, BATCH, RankInfo(), "cpu", LoaderConfig(prefetch=0))
    next(loader.steps(step))
    return time.perf_counter() - start


def _table(samples: int, step: int) -> float:
    from torch.utils.data import BatchSampler, RandomSampler

    start = time.perf_counter()
    next(islice(BatchSampler(RandomSampler(range(samples)), BATCH, drop_last=False), step, None))
    return time.perf_counter() - start


if __name__ == "__main__":
    _child()

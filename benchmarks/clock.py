"""The clock that a contestant's model ticks; when it has ticked often enough, rank 0 writes down what it saw."""

from __future__ import annotations

import json
import os
import resource
import time
from itertools import pairwise
from pathlib import Path

GAPS = int(os.environ.get("BENCH_STEPS", "3"))
WARMUP = int(os.environ.get("BENCH_WARMUP", "0"))


class Ticker:
    """Counts forward passes: WARMUP are let pass, the GAPS after them are measured."""

    def __init__(self) -> None:
        self.walls: list[int] = []
        self.cpu_from = 0.0

    def tick(self) -> None:
        self.walls.append(time.perf_counter_ns())
        count = len(self.walls)
        if count == 2:
            self.first_step_at = time.time()
        if count == WARMUP + 1:
            self.cpu_from = time.process_time()
        elif count == WARMUP + 1 + GAPS:
            self.write(time.process_time() - self.cpu_from)

    def write(self, cpu_s: float) -> None:
        if "BENCH_OUT" not in os.environ or os.environ.get("RANK", "0") != "0":
            return
        walls = self.walls[WARMUP:]
        gaps = [(after - before) / 1e3 for before, after in pairwise(walls)]
        seen = {
            "gaps_us": gaps,
            "cpu_us": cpu_s / GAPS * 1e6,
            "first_step_at": self.first_step_at,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        Path(os.environ["BENCH_OUT"]).write_text(json.dumps(seen))


TICKER = Ticker()

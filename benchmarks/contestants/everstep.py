"""Everstep as a user runs it: a composed config and a run folder, with metrics, hooks, stop flag and NaN guard on."""

from __future__ import annotations

import sys

from benchmarks.problem import BATCH, STEPS, scratch, world
from everstep.trainer.__main__ import main

if __name__ == "__main__":
    settings = {
        "run_root": scratch(),
        "run": "bench",
        "steps": STEPS,
        "checkpoint.every": STEPS + 1,
        "global_batch": BATCH * world(),
    }
    sys.argv[1:] = [
        *("--config-dir", "benchmarks/conf", "experiment=overhead", "plugins=[benchmarks]"),
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    sys.exit(main())

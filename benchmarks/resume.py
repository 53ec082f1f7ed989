"""From `everstep resume` to the end of the first step that follows: where the seconds go, as the run itself tells it.

A run of two steps is resumed with one more. Parts are those of `laps_s` in its `events.jsonl`; `command` is what comes
before the processes that train: the verb, torchrun, and its agent.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.contest import ROOT, FailedError
from benchmarks.table import machine, markdown, spread
from everstep.run_folder import EVENTS, RunFolder

PARTS = ("command", "import", "rendezvous", "config", "build", "load", "first step")
HEAD = ("processes", "n", *(f"{part}, s" for part in PARTS), "in all, s")


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    seen: dict[int, list[dict[str, float]]] = {processes: [] for processes in options.processes}
    for number in range(options.rounds):
        for processes, rounds in seen.items():
            rounds.append(_measure(processes, options.width))
        print(f"round {number + 1} of {options.rounds}", flush=True)
    size_mb = 3 * 4 * options.width**2 / 1e6
    print(f"\n{size_mb:.0f} MB of parameters and moments; {machine()}\n")
    print(markdown(HEAD, [_row(processes, rounds) for processes, rounds in seen.items()]))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks resume", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=int, default=6000, help="of the middle layer: width² parameters")
    return parser


def _row(processes: int, rounds: Sequence[dict[str, float]]) -> list[str]:
    parts = [spread([one.get(part, 0.0) for one in rounds]) for part in PARTS]
    return [str(processes), str(len(rounds)), *parts, spread([sum(one.values()) for one in rounds])]


def _measure(processes: int, width: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        where = ["--config-dir", "benchmarks/conf", "experiment=overhead", f"run_root={root}", "run=bench"]
        sizes = [f"job.nproc={processes}", f"task.width={width}", f"global_batch={32 * processes}"]
        _everstep("run", *where, *sizes, "steps=2")
        called = time.time()
        _everstep("resume", "bench", "--root", root, "steps=3")
        folder = RunFolder(f"{root}/bench")
        began = float(folder.claim_of(2)["began"])
        (laps,) = [event["laps_s"] for event in folder.lines(2, EVENTS) if event["event"] == "first_step"]
    return {"command": began - called, **laps}


def _everstep(*words: str) -> None:
    argv = [sys.executable, "-m", "everstep.launch", *words, "plugins=[benchmarks]"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise FailedError(done.stderr)

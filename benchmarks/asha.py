"""Asha beside the grid: handwritten digits, 27 configs, both to their end as `everstep sweep` runs them.

Steps are those that were trained, told by where each start of each trial began and ended. A trial that has come to the
last rung is the grid's own trial: `as in the grid` counts those that end with the same accuracy to the bit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contest import ROOT
from benchmarks.table import machine, markdown
from everstep.launch.console import duration
from everstep.launch.sweep.leaderboard import ranked
from everstep.launch.sweep.plan import load
from everstep.launch.sweep.sweep_folder import SweepFolder
from everstep.run_folder import RunFolder

SPACE = ("optimizer.lr=1e-3,4e-3,1.6e-2", "model.width=8,16,32", "model.dropout=0,0.1,0.3")
HEAD = ("seed", "sweep", "steps", "of the grid's", "starts", "best accuracy", "short of the grid's best, points",
        "as in the grid", "wall")  # fmt: skip


@dataclass(frozen=True)
class Swept:
    """One sweep that has ended."""

    accuracies: dict[str, float]
    """Of the trials that came to the last step, the best first."""
    steps: int
    starts: int
    wall_s: float


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as root:
            grid = _swept(root, "grid", options, seed)
            asha = _swept(root, "asha", options, seed, "sweep.pruner=asha")
        rows += [_row(seed, "grid", grid, grid), _row(seed, "asha", asha, grid)]
    print(f"27 configs of {options.steps} steps, {options.parallel} at a time; {machine()}\n")
    print(markdown(HEAD, rows))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks asha", description=__doc__)
    parser.add_argument("--steps", type=int, default=180, help="of a whole run; rungs are a ninth, a third and all")
    parser.add_argument("--parallel", type=int, default=2, help="trials at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def _row(seed: int, name: str, swept: Swept, grid: Swept) -> list[str]:
    best, most = next(iter(swept.accuracies.values())), next(iter(grid.accuracies.values()))
    same = sum(grid.accuracies[trial] == value for trial, value in swept.accuracies.items())
    return [str(seed), name, f"{swept.steps:,}", f"{swept.steps / grid.steps:.0%}", str(swept.starts), f"{best:.4f}",
            f"{100 * (most - best):.2f}", f"{same} of {len(swept.accuracies)}", duration(swept.wall_s)]  # fmt: skip


def _swept(root: str, name: str, options: argparse.Namespace, seed: int, *words: str) -> Swept:
    argv = [sys.executable, "-m", "everstep.launch", "sweep", "experiment=digits", *SPACE, f"steps={options.steps}",
            f"seed={seed}", "evaluate.every=null", "log.progress=off", f"job.max_parallel={options.parallel}",
            "sweep.poll_s=0.2", f"run={name}", f"run_root={root}", *words]  # fmt: skip
    begun = time.monotonic()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    wall_s = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}")
    folder = SweepFolder(str(Path(root, name)))
    plan, story = load(folder), folder.story()
    spans = [span for trial in story.trials for span in _spans(folder.run(trial.name))]
    whole = {row.trial.name: row.values[0] for row in ranked(plan, story) if row.step == options.steps}
    return Swept(whole, sum(end - begin for begin, end in spans), len(spans), wall_s)


def _spans(run: RunFolder) -> list[tuple[int, int]]:
    """Where each start of a trial began and ended, in steps."""
    found = []
    for number in run.attempts():
        ending = run.ending(number)
        if ending is None:
            raise SystemExit(f"{run.url}: attempt {number} has left no word")
        found.append((int(run.facts(run.attempt(number, "restored.json")).get("step", 0)), ending.step))
    return found

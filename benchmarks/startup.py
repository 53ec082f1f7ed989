"""From the start of a command to the end of its first optimizer step.

`everstep` trains what the run folder says, as `everstep run` and the cluster scripts start it; `everstep_run` is the
whole command, which composes the config and forks that from a process that has imported torch, or starts it as a child.
With two processes `plain` is under torchrun.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contest import CONTESTANTS, ROOT, Contestant, FailedError, MissingError, chosen, run
from benchmarks.table import figures, machine, markdown, ratios, spread

SETTINGS = {"STEPS": 3, "WARMUP": 0, "SAMPLES": 1024}
HEAD = ("contestant", "n", "first step after, s", "whole command, s", "first step / plain", "first step − plain, s")
OVERRIDES = ("--config-dir", "benchmarks/conf", "experiment=overhead", "plugins=[benchmarks]", "steps=4")
COMMANDS = ("import torch", "everstep", "everstep_run", "everstep_run, job.warm=false")


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    peers = chosen(options.only, [c.name for c in CONTESTANTS if c.name not in ("plain_fused", "floor", "everstep")])
    rounds: dict[str, list[dict[str, float]]] = {"first": [], "wall": []}
    absent: dict[str, str] = {}
    commands = [name for name in COMMANDS if options.processes == 1 or name.startswith("everstep_run")]
    names = [*commands, *(peer.name for peer in peers)]
    for _ in range(options.rounds):
        for figure in rounds.values():
            figure.append({})
        everybody: list[Contestant | str] = [*commands, *peers]
        for contestant in everybody:
            name = contestant if isinstance(contestant, str) else contestant.name
            if name in absent:
                continue
            try:
                first, wall = _measure(contestant, options.processes)
            except (MissingError, FailedError) as error:
                absent[name] = str(error)
                continue
            rounds["first"][-1][name], rounds["wall"][-1][name] = first, wall
        print("  ".join(f"{name} {seconds:.2f}" for name, seconds in rounds["first"][-1].items()), flush=True)
    processes = "1 process" if options.processes == 1 else f"{options.processes} processes"
    print(f"\n{processes}, python files compiled, disk cache warm; {machine()}\n")
    print(markdown(HEAD, [_row(name, rounds, absent) for name in names]))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", default="", metavar="A,B", help="contestants beside Everstep, plain among them")
    return parser


def _measure(contestant: Contestant | str, processes: int) -> tuple[float, float]:
    """Seconds to the end of the first step, and to the end of the command."""
    if isinstance(contestant, Contestant):
        contestant.check()
        seen = run(contestant.argv(processes), SETTINGS)
    elif contestant == "import torch":
        seen = run([sys.executable, "-c", JUST_TORCH], SETTINGS)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-run-") as root:
            kind = ["parallel=single"] if processes == 1 else ["parallel=ddp", "global_batch=64"]
            argv = ["-m", "everstep.launch", "run", *OVERRIDES, f"run_root={root}", "run=bench", *kind]
            argv += [f"job.nproc={processes}", f"job.warm={str(not contestant.endswith('false')).lower()}"]
            if contestant == "everstep":
                _settle(root)
                argv = ["-m", "everstep.trainer", "--frozen", f"{root}/bench", "--plugins", "benchmarks"]
            seen = run([sys.executable, *argv], SETTINGS)
    return seen["first_step_at"] - seen["started"], seen["wall_s"]


JUST_TORCH = """
import os, time, torch
open(os.environ["BENCH_OUT"], "w").write('{"first_step_at": %f}' % time.time())
"""


def _settle(root: str) -> None:
    """A run folder that is ready to train, as `everstep run` leaves it for its child."""
    text = subprocess.run(
        [sys.executable, "-c", SETTLE, root, *OVERRIDES[2:]], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if text.returncode or not Path(root, "bench", "config.yaml").exists():
        raise FailedError(text.stderr)


SETTLE = """
import sys
from everstep import compose, frozen_config
from everstep.run_folder import RunFolder
run = compose.compose([*sys.argv[2:], f"run_root={sys.argv[1]}", "run=bench", "parallel=single"],
                      ["benchmarks/conf"]).run
frozen_config.settle(run, RunFolder.of(run.run_root, run.run))
"""


def _row(name: str, rounds: dict[str, list[dict[str, float]]], absent: dict[str, str]) -> list[str]:
    first, wall = rounds["first"], rounds["wall"]
    if name in absent:
        return [name, "0", f"not measured: {absent[name].splitlines()[-1][:80]}", "–", "–", "–"]
    more = [one[name] - one["plain"] for one in first if name in one and "plain" in one]
    return [
        name,
        str(len(figures(first, name))),
        spread(figures(first, name)),
        spread(figures(wall, name)),
        spread(ratios(first, name, "plain")),
        spread([round(seconds, 3) for seconds in more]),
    ]

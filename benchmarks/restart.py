"""From kill -9 of one of two workers to the end of the next step, and how many steps are done a second time.

`torchrun` is a hand-written loop under `torchrun --max-restarts`, as it comes; `torchrun, new store` has the variable
set without which gloo may meet the addresses of the dead; `everstep` is `everstep run job.nproc=2`, as it comes, and
with torchrun in place of its fork server; last, the fork server is killed, and both workers with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from benchmarks.contest import ROOT, FailedError, environment, torchrun
from benchmarks.footprints import Footprint, footprints
from benchmarks.table import machine, markdown, spread

HEAD = ("contestant", "n", "kill to next step, s", "steps done again", "did not come back")
DEADLINE_S = 90.0
SERVER_DIES = "everstep, its fork server killed"
NAMES = ("torchrun", "torchrun, new store", "everstep", "everstep, job.warm=false", SERVER_DIES)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    again: dict[str, list[float]] = {name: [] for name in NAMES}
    lost: dict[str, list[str]] = {name: [] for name in NAMES}
    for number in range(options.rounds):
        for name in NAMES:
            try:
                gap, repeated = _measure(name, options.save_every)
            except FailedError as error:
                lost[name].append(str(error))
                print(f"round {number + 1}: {name}: {error}", flush=True)
                continue
            seconds[name].append(gap)
            again[name].append(repeated)
            print(f"round {number + 1}: {name} {gap:.2f} s, {repeated} steps again", flush=True)
    print(f"\n2 processes, a checkpoint every {options.save_every} steps; {machine()}\n")
    print(markdown(HEAD, [
        [name, str(options.rounds), spread(seconds[name]), spread(again[name]), str(len(lost[name])) + _why(lost[name])]
        for name in NAMES
    ]))  # fmt: skip
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks restart", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    return parser


def _why(reasons: list[str]) -> str:
    return f" ({reasons[-1].splitlines()[0]})" if reasons else ""


def _measure(name: str, save_every: int) -> tuple[float, int]:
    """Seconds from the kill to the end of the next step of the killed rank, and how many steps that repeats."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
        out = Path(scratch, "footprints")
        with _started(name, out, scratch, save_every) as child:
            # Half way between two checkpoints.
            far = 2 * save_every + save_every // 2
            before = _await(child, out, lambda one: one.rank == 1 and one.step >= far, "the first steps")
            killed = time.time()
            os.kill(psutil.Process(before.pid).ppid() if name == SERVER_DIES else before.pid, signal.SIGKILL)
            after = _await(child, out, lambda one: one.rank == 1 and one.pid != before.pid, "the step after the kill")
            reached = max(one.step for one in footprints(out) if one.pid == before.pid)
        return after.time - killed, reached - after.step + 1


def _await(child: subprocess.Popen[bytes], out: Path, fits: Callable[[Footprint], bool], what: str) -> Footprint:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for one in footprints(out):
            if fits(one):
                return one
        if child.poll() is not None:
            raise FailedError(f"{what} did not come: ended with {child.returncode}")
        time.sleep(0.02)
    raise FailedError(f"{what} did not come within {DEADLINE_S:.0f} s")


@contextlib.contextmanager
def _started(name: str, out: Path, scratch: str, save_every: int) -> Iterator[subprocess.Popen[bytes]]:
    settings = {"SAVE_EVERY": save_every, "STEPS": 100_000, "SAMPLES": 65536}
    env = environment(out, scratch, settings)
    if name.startswith("everstep"):
        run = ["experiment=overhead", "plugins=[benchmarks]", f"run_root={scratch}", "run=bench", "job.nproc=2"]
        run += ["job.warm=false"] * name.endswith("false")
        rest = [f"checkpoint.every={save_every}", "steps=100000", "global_batch=64",
                "hooks=[{_target_: benchmarks.task.Footprints}]"]  # fmt: skip
        argv = [sys.executable, "-m", "everstep.launch", "run", "--config-dir", "benchmarks/conf", *run, *rest]
    else:
        if name == "torchrun, new store":
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        script = ["-m", "benchmarks.contestants.plain_restart"]
        argv = [*torchrun(sys.executable, 2, "--max-restarts=3", "--monitor-interval=0.1"), *script]
    with Path(scratch, "log").open("w") as log:
        child = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            yield child
        finally:
            _end(child, str(out))


def _end(child: subprocess.Popen[bytes], mark: str) -> None:
    """Kill all that was started with our environment: torchrun's workers have sessions of their own."""
    child.kill()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"BENCH_OUT={mark}\0".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
    child.wait()

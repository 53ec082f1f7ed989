"""What a sweep of many trials costs the machine of its driver; what the trials cost does not count.

`expand` lists all trials and renders the first (`everstep sweep --dry-run`). `drive` asks, submits, follows and tells
every trial, all of them in flight at once, on a scheduler of which a tenth of the jobs end with each question. `go on`
is the next driver: it reads all records, and finds nothing to do. Each is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.contest import ROOT
from benchmarks.table import machine, markdown
from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Ask, Program, Rendered
from everstep.launch.schedulers.job import JobHandle, JobState, JobStatus
from everstep.outcome import Ending, Outcome
from everstep.run_folder import METRICS, RunFolder

HEAD = ("sampler", "what", "CPU, s", "peak memory, MB", "torch imported", "looks", "questions")
PARTS = ("expand", "drive", "go on")
STEPS = 400


class Instant:
    """A scheduler whose jobs leave what a trainer leaves, and end: a tenth of those that it is asked about."""

    def __init__(self) -> None:
        self.folders: dict[JobHandle, RunFolder] = {}
        self.ended: set[JobHandle] = set()
        self.questions = 0
        self.played_s = 0.0
        """CPU time that was spent as a trainer."""

    def render(self, job: JobConfig, program: Program) -> Rendered:
        return Rendered((program.folder,))

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        return []

    def submit(self, rendered: Rendered) -> JobHandle:
        handle = JobHandle("slurm", "instant", str(len(self.folders) + 1))
        self.folders[handle] = RunFolder(rendered.argv[0])
        return handle

    def find(self, token: str) -> JobHandle | None:
        return None

    def status(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        if not handles:
            return {}
        self.questions += 1
        begun = time.process_time()
        for handle in handles[: max(1, len(self.folders) // 10)]:
            self._end(handle)
        self.played_s += time.process_time() - begun
        return {handle: JobStatus(JobState.succeeded if handle in self.ended else JobState.running)
                for handle in handles}  # fmt: skip

    def follow(self) -> AbstractContextManager[Ask]:
        return contextlib.nullcontext(self.status)

    def cancel(self, handles: Sequence[JobHandle]) -> None:
        raise RuntimeError("no trial of this sweep is cut short")

    def _end(self, handle: JobHandle) -> None:
        folder = self.folders[handle]
        attempt = folder.claim({"world": 1, "began": time.time()})
        accuracy = int(handle.id) % 97 / 97
        record = {"kind": "evaluate", "step": STEPS, "time": time.time(), "accuracy": accuracy}
        folder.storage.write(folder.attempt(attempt, METRICS), (json.dumps(record) + "\n").encode())
        folder.end(attempt, Ending(Outcome.done, STEPS))
        self.ended.add(handle)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    rows = []
    for sampler in options.samplers:
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
            for what in PARTS:
                seen = _measured(what, sampler, options.trials, folder)
                rows.append([sampler, what, f"{seen['cpu_s']:.2f}", f"{seen['memory_mb']:.0f}", seen["torch"],
                             str(seen.get("looks", "–")), str(seen.get("questions", "–"))])  # fmt: skip
    print(f"{options.trials:,} trials; {machine()}\n")
    print(markdown(HEAD, rows))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    return parser


def _measured(what: str, sampler: str, trials: int, folder: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "benchmarks.sweep", what, sampler, str(trials), folder]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what}: exit code {done.returncode}: {done.stderr[-2000:]}")
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def _words(sampler: str, trials: int, folder: str) -> list[str]:
    space = ["optimizer.lr=tag(log,interval(1e-5,1e-2))", "optimizer.weight_decay=interval(0,0.1)",
             "model.dropout=interval(0,0.5)"]  # fmt: skip
    sweep = [f"sweep.sampler={sampler}", f"sweep.trials={trials}", "sweep.poll_s=0.001"]
    job = ["job=slurm", f"job.max_parallel={trials}"]
    return ["experiment=digits", f"steps={STEPS}", *space, *sweep, *job, "run=s", f"run_root={folder}"]


def _part(what: str, words: list[str]) -> dict[str, Any]:
    """One part, in a process that has done nothing else."""
    with contextlib.redirect_stdout(io.StringIO()):
        played_s, facts = (_expand if what == "expand" else _drive)(words)
    status = Path("/proc/self/status").read_text()
    peak_kb = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    torch = "yes" if "torch" in sys.modules else "no"
    return {"cpu_s": time.process_time() - played_s, "memory_mb": int(peak_kb) / 1024, "torch": torch, **facts}


def _expand(words: list[str]) -> tuple[float, dict[str, int]]:
    from everstep.launch.cli.sweep import sweep

    sweep(["--dry-run", *words])
    return 0.0, {}


def _drive(words: list[str]) -> tuple[float, dict[str, int]]:
    """What `everstep sweep` does once it has looked at the cluster; CPU seconds of others, and counts."""
    from everstep.launch.job_start.signals import Signals
    from everstep.launch.sweep.driver import Driver
    from everstep.launch.sweep.leaderboard import print_rows, ranked
    from everstep.launch.sweep.lease import take
    from everstep.launch.sweep.plan import plan, settle
    from everstep.launch.sweep.workers_cluster import ClusterWorkers

    made, scheduler, in_flight = settle(plan(words)), Instant(), []
    lease = take(made.folder.storage)
    story = made.folder.story()
    with Signals() as signals:
        Driver(made, story, ClusterWorkers(made.job, scheduler), lease, signals,
               lambda story, running: in_flight.append(len(running))).run()  # fmt: skip
    lease.release()
    print_rows(made, ranked(made, story), made.metrics)
    return scheduler.played_s, {"looks": len(in_flight), "questions": scheduler.questions}


if __name__ == "__main__":
    print(json.dumps(_part(sys.argv[1], _words(sys.argv[2], int(sys.argv[3]), sys.argv[4]))))

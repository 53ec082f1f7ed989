"""What it costs to make one job for Slurm or Kubernetes, without submitting it: CPU seconds of whole commands.

`everstep` composes and checks the run's config on the way; torchx has none. CPU seconds and not wall time, since the
former change little when the machine has other work.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contest import PEERS_PYTHON, ROOT
from benchmarks.table import figures, machine, markdown, ratios, spread

HEAD = ("command", "n", "CPU, s", "CPU / torchx")
EVERSTEP = [sys.executable, "-m", "everstep.launch"]
JOB = ["job.nodes=2", "job.nproc=8", "job.time=10h", "experiment=gpt_stdlib", "run=bench"]
SLURM = ["job=slurm", "job.partition=a", *JOB]
K8S = ["job=k8s", "job.image=registry.example.com/everstep:1", "run_root=s3://bucket/runs", *JOB]
TORCHX = str(Path(PEERS_PYTHON).with_name("torchx"))
COMMANDS: dict[str, list[str]] = {
    "everstep --help": [*EVERSTEP, "--help"],
    "everstep submit job=slurm --dry-run": [*EVERSTEP, "submit", "--dry-run", *SLURM],
    "everstep submit job=k8s --dry-run": [*EVERSTEP, "submit", "--dry-run", *K8S],
    "torchx run --dryrun": [TORCHX, "run", "--dryrun", "-s", "slurm", "-cfg", "partition=a,time=600",
                            "dist.ddp", "-j", "2x8", "--script", "main.py"],
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    commands = dict(COMMANDS)
    absent = [] if Path(TORCHX).exists() else ["torchx run --dryrun"]
    for name in absent:
        del commands[name]
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds + 1):
        measured = {name: cpu_s(argv) for name, argv in commands.items()}
        if number:  # the first round warms the disk's cache
            rounds.append(measured)
    rows = [
        [name, str(len(rounds)), spread(figures(rounds, name)), spread(ratios(rounds, name, "torchx run --dryrun"))]
        for name in commands
    ]
    rows += [[name, "0", f"not measured: there is no {TORCHX}", "–"] for name in absent]
    print(markdown(HEAD, rows))
    print(f"\n{machine()}")
    return 0


def cpu_s(argv: Sequence[str]) -> float:
    """User and system seconds of one command and all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "main.py").touch()
        # An installed package has its bytecode beside it; a checkout gets it in the first round.
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run(argv, cwd=folder, env=env, check=True, capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    return parser

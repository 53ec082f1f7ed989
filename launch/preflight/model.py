"""Preflight checks with torch: build the run's parts in a child process, for its number of processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from everstep.config import ParallelKind, RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import freeze
from everstep.import_path import safe_flags
from everstep.launch.config import JobConfig, processes
from everstep.launch.console import say
from everstep.launch.preflight.dataset_paths import datasets, only_there

SHARDED = (ParallelKind.fsdp, ParallelKind.hsdp)


def rehearse(
    run: RunConfig, job: JobConfig, brief: bool = False, code: Path | None = None, known: Sequence[str] = ()
) -> int:
    """Build the parts and the first batch by `python -m everstep.trainer check`; return its exit code.

    Problems are printed to stderr, one line each. Nothing is checked when this Python has no torch.

    Args:
        brief: print only a line or two, on stderr, about the parts that are fine.
        code: the code snapshot of the run, where it may differ from the checkout.
        known: problems that have been printed; the child's lines about them are left out.

    Raises:
        ConfigError: the child gave no result.
    """
    if find_spec("torch") is None:
        say(f"{sys.executable} has no torch, so model and data were not looked at here")
        return 0
    words = [word for world in _ends(run, worlds(run, job)) for word in ("--world", str(world))]
    away = [path for _, path in datasets(run) if only_there(path, job)]
    if away:
        say(f"{', '.join(away)}: only pods can see the data, so it was not looked at here")
    flags = [*(["--brief"] if brief else []), *(["--no-data"] if away else [])]
    argv = [sys.executable, *safe_flags(), "-m", "everstep.trainer", "check", "--frozen", *words, *flags]
    # The paths of an image need not exist on this machine.
    env = {**os.environ, **(job.env if job.image is None else {})}
    if code is not None:
        from everstep.launch.submit.snapshot import search_path

        env |= search_path(code, env.get("PYTHONPATH", ""))
    done = subprocess.run(
        argv,
        input=freeze(run),
        env=env,
        stdout=subprocess.PIPE if brief else None,
        stderr=subprocess.PIPE if known else None,
        check=False,
        encoding="utf-8",
        errors="replace",
    )
    lines = {f"error: {problem}" for problem in known}
    for line in (done.stderr or "").splitlines():
        if line not in lines:
            print(line, file=sys.stderr)
    if done.returncode not in (0, ConfigError.exit_code):
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise ConfigError(f"the look at model and data {how} and came to no answer; --quick does without")
    for line in (done.stdout or "").splitlines():
        say(line)
    return done.returncode


def worlds(run: RunConfig, job: JobConfig) -> list[int]:
    """Return the world sizes that a start may have, smallest first.

    Without a number of processes per node, return the smallest that are possible.
    """
    fewest, most = job.node_range
    each = _each(run, job)
    if each is not None:
        return [nodes * each for nodes in range(fewest, most + 1)]
    return [math.lcm(nodes, run.parallel.shard or 1) for nodes in (fewest, most)]


def _each(run: RunConfig, job: JobConfig) -> int | None:
    """Return the processes per node; None if unknown."""
    if isinstance(job.nproc, int):
        return job.nproc
    if job.scheduler == "local":
        return 1 if run.parallel.kind is ParallelKind.single else processes(job)
    return job.gpus if isinstance(job.gpus, int) and job.gpus else None  # GPUs of the nodes: this machine may have none


def _ends(run: RunConfig, worlds: list[int]) -> list[int]:
    """Return the world sizes to check: for a sharded model the smallest and the largest, else the largest.

    A sharded model needs most memory on the fewest processes, and may not be divisible among the most.
    """
    return sorted({worlds[0], worlds[-1]}) if run.parallel.kind in SHARDED else worlds[-1:]

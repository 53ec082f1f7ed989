"""Use of a trained run: a checkpoint, the config to use it with, and processes on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import freeze, start_digest, thaw
from everstep.import_path import safe_flags
from everstep.launch import torchrun
from everstep.launch.config import JobConfig, job_config, processes, refuse_too_many, threads
from everstep.launch.job_start.child import leash
from everstep.launch.parser import add_overrides
from everstep.launch.runs.lookup import add_root, find
from everstep.launch.submit.job_spec import read_job
from everstep.launch.submit.override_frozen import DEFINING_GROUPS, amend
from everstep.launch.submit.trust import Runnable, refuse_foreign
from everstep.run_folder import CONFIG, RunFolder
from everstep.storage import Storage

WHICH = re.compile(r"(.+)@(last|best|\d+)")
CHANGEABLE = ("data", "evaluate", "loader", "micro_batch", "global_batch", "bad_samples", "plugins", "job", "precision")
"""Keys that a command line may change, with those below them: data, batches and processes."""


@dataclass(frozen=True)
class ChosenRun:
    """A run, one of its checkpoints, and the config to use it with."""

    folder: RunFolder
    which: str
    config: RunConfig
    job: JobConfig
    """Environment of the run's own job, with what the command line says."""


def choose_run(word: str, options: argparse.Namespace, overrides: Sequence[str]) -> ChosenRun:
    """Return the run with the changes of the command line; refuse code of others."""
    named = WHICH.fullmatch(word)
    name, which = (named[1], named[2]) if named else (word, "last")
    folder = find(name, options.root)
    try:
        config = thaw(folder.storage.read(CONFIG))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder.url} has no {CONFIG}: there is nothing to {options.verb}") from error
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.split(".")[0] not in CHANGEABLE:
            raise ConfigError(f"{override}: {options.verb} takes changes of {', '.join(CHANGEABLE)} only; leave it out")
    recorded = _recorded_job(folder)
    # As many threads as in training: a sum over more of them has other last bits.
    kept = {"env": recorded.get("env") or {}, "threads": recorded.get("threads")}
    changed, job = amend(config, kept, overrides, options.config_dir, DEFINING_GROUPS)
    _, said_job = amend(config, {}, overrides, options.config_dir, DEFINING_GROUPS)
    said = changed.plugins if any(word.startswith("plugins=") for word in overrides) else ()
    refuse_foreign(
        folder.storage,
        recorded=Runnable.of(job_config(recorded), config.plugins).of_folder(folder.storage),
        used=Runnable.of(job_config(job), changed.plugins).of_folder(folder.storage),
        said=Runnable.of(job_config(said_job), said),
        trusted=options.trust,
        fix="add --trust, or name them with plugins=",
    )
    if not any(override.startswith("evaluate.limit=") for override in overrides):
        # Training may look at a part of the set, to save time.
        changed = dataclasses.replace(changed, evaluate=dataclasses.replace(changed.evaluate, limit=None))
    here = job_config(job)
    _refuse_cluster(here, options.verb)
    return ChosenRun(folder, which, changed, here)


def _refuse_cluster(job: JobConfig, verb: str) -> None:
    """Raise ConfigError if the command line asks for a job elsewhere or for several nodes."""
    asked = f"job={job.scheduler}" if job.scheduler != "local" else f"job.nodes={job.nodes}"
    if job.scheduler != "local" or job.nodes != 1:
        raise ConfigError(
            f"{asked}: {verb} runs on this machine alone; leave it out, or give the command to srun or a pod"
        )


def _recorded_job(folder: RunFolder) -> dict[str, Any]:
    try:
        return read_job(folder)
    except FileNotFoundError:  # torchrun started it, without the launcher
        return {}


def claim_folder(chosen: ChosenRun, within: str) -> str:
    """Claim the next numbered folder for a result, by the config in it; return its name in the run folder."""
    storage, text = chosen.folder.storage, freeze(chosen.config).encode()
    number = max((int(name) for name in storage.names(within) if name.isdigit()), default=0) + 1
    while not storage.create(f"{within}/{number:04d}/{CONFIG}", text):
        number += 1
    return f"{within}/{number:04d}"


def write_config(work: Storage, config: RunConfig, name: str = "") -> None:
    """Write the config that the processes read into the folder `name`."""
    work.write(f"{name}/{CONFIG}".lstrip("/"), freeze(config).encode())


def trainer_arguments(chosen: ChosenRun, on: str) -> list[str]:
    plugins, digest = chosen.config.plugins, start_digest(chosen.config)
    named = ["--plugins", ",".join(plugins)] if plugins else []
    return ["--source", chosen.folder.url, "--which", chosen.which, "--on", on, "--config-digest", digest, *named]


def run_trainer(words: Sequence[str], job: JobConfig) -> int:
    """Run the trainer's verb on this machine; return its exit code, of several processes torchrun's 1.

    The trainer dies with this process: it would go on beside the same command given again, and hold its devices.
    """
    nproc = processes(job)
    refuse_too_many(nproc)
    program = ["-m", "everstep.trainer", *words]
    argv = [sys.executable, *safe_flags(), *program]
    if nproc > 1:
        argv = torchrun.agent(program, nproc, job.grace_s, torchrun.Rendezvous(id=uuid.uuid4().hex))
    env = torchrun.environment(os.environ, threads(job, nproc), job.env)
    sys.stdout.flush()
    return subprocess.run(argv, env=env, check=False, preexec_fn=leash(os.getpid())).returncode


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("run", metavar="RUN[@last|@best|@STEP]", help="a run, and which of its checkpoints (last)")
    add_root(parser)
    add_overrides(parser, "other data, batch or processes: data.path=…, evaluate.batch=…, job.nproc=…")
    parser.add_argument("--on", default="validation", metavar="SET", help="validation, test, train, or a set's name")
    parser.add_argument("--trust", action="store_true", help="run what the folder of another user names")
    parser.set_defaults(verb=verb)

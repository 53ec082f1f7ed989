"""`everstep evaluate RUN` and `everstep predict RUN`: use the checkpoints of a run on this machine."""

from __future__ import annotations

import argparse
import json
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
from everstep.launch.parser import Arguments, add_overrides
from everstep.launch.runs.lookup import add_root, find
from everstep.launch.submit.job_spec import read_job
from everstep.launch.submit.override_frozen import DEFINING_GROUPS, amend
from everstep.launch.submit.trust import Runnable, refuse_foreign
from everstep.run_folder import CONFIG, EVALUATIONS, RunFolder
from everstep.storage import Storage, join_url, open_storage

WHICH = re.compile(r"(.+)@(last|best|\d+)")
CHANGED = ("data", "evaluate", "loader", "micro_batch", "global_batch", "bad_samples", "plugins", "job", "precision")
"""Keys that a command line may change, with those below them: data, batches and processes."""
ROWS = 100_000
HIDDEN = "_everstep"
"""Folder of config and plan beside predictions: readers of Parquet folders ignore such names."""

EXAMPLES = """examples:
  everstep evaluate demo                          the newest checkpoint on the validation set
  everstep evaluate demo@best --on test           the best one on the test set
  everstep evaluate demo@1200 --by label          a row for each value of a column
  everstep evaluate new --against old@best        both on the same samples, with the difference
  everstep evaluate demo data.path=/data/2027     on other data
"""
PREDICT_EXAMPLES = """examples:
  everstep predict demo@best --out predictions/           a folder of Parquet files
  everstep predict demo --out s3://bucket/p --on train    the same command again goes on where it was killed
"""


@dataclass(frozen=True)
class Chosen:
    """A run, one of its checkpoints, and the config to use it with."""

    folder: RunFolder
    which: str
    config: RunConfig
    job: JobConfig
    """Environment of the run's own job, with what the command line says."""


def evaluate(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is that of the trainer's processes."""
    options = _evaluate_parser().parse_intermixed_args(arguments)
    chosen = _chosen(options.run, options, options.overrides)
    path = ""
    if options.out:
        work = open_storage(options.out)
        _put(work, "", chosen.config)
    else:
        path = _new_evaluation(chosen)
        work = open_storage(join_url(chosen.folder.url, path))
    words = ["evaluate", work.url, *_words(chosen, options.on)]
    if options.against:
        words += ["--against", json.dumps(_other(options, work))]
    words += ["--by", options.by] if options.by else []
    code = _start([*words, *(["--json"] if options.json else [])], chosen.job)
    if code and path:
        chosen.folder.storage.delete(path)
    return code


def predict(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is that of the trainer's processes."""
    options = _predict_parser().parse_intermixed_args(arguments)
    if options.rows < 1:
        raise ConfigError(f"--rows {options.rows}: a part has at least one row")
    chosen = _chosen(options.run, options, options.overrides)
    work = open_storage(join_url(options.out, HIDDEN))
    _put(work, "", chosen.config)
    words = ["predict", work.url, *_words(chosen, options.on), "--out", options.out, "--rows", str(options.rows)]
    return _start(words, chosen.job)


def _chosen(word: str, options: argparse.Namespace, overrides: Sequence[str]) -> Chosen:
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
        if key.split(".")[0] not in CHANGED:
            raise ConfigError(f"{override}: {options.verb} takes changes of {', '.join(CHANGED)} only; leave it out")
    recorded = _recorded_job(folder)
    changed, job = amend(config, {"env": recorded.get("env") or {}}, overrides, options.config_dir, DEFINING_GROUPS)
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
    return Chosen(folder, which, changed, job_config(job))


def _recorded_job(folder: RunFolder) -> dict[str, Any]:
    try:
        return read_job(folder)
    except FileNotFoundError:  # torchrun started it, without the launcher
        return {}


def _new_evaluation(chosen: Chosen) -> str:
    """Claim the next folder of an evaluation, by the config in it; return its name in the run folder."""
    storage, text = chosen.folder.storage, freeze(chosen.config).encode()
    number = max((int(name) for name in storage.names(EVALUATIONS) if name.isdigit()), default=0) + 1
    while not storage.create(f"{EVALUATIONS}/{number:04d}/{CONFIG}", text):
        number += 1
    return f"{EVALUATIONS}/{number:04d}"


def _put(work: Storage, name: str, config: RunConfig) -> None:
    """Write the config that the processes read; it must be the same if it is there already."""
    text, path = freeze(config).encode(), f"{name}/{CONFIG}".lstrip("/")
    if not work.create(path, text) and start_digest(thaw(work.read(path))) != start_digest(config):
        raise ConfigError(f"{work.url} holds results of another config; choose another --out")


def _words(chosen: Chosen, on: str) -> list[str]:
    plugins, digest = chosen.config.plugins, start_digest(chosen.config)
    named = ["--plugins", ",".join(plugins)] if plugins else []
    return ["--source", chosen.folder.url, "--which", chosen.which, "--on", on, "--config-digest", digest, *named]


def _other(options: argparse.Namespace, work: Storage) -> dict[str, str]:
    """Return the checkpoint to compare with; it gets the samples of the first run."""
    other = _chosen(options.against, options, [])
    _put(work, "against", other.config)
    return {
        "run": other.folder.url,
        "which": other.which,
        "config": join_url(work.url, "against"),
        "digest": start_digest(other.config),
        "plugins": ",".join(other.config.plugins),
    }


def _start(words: Sequence[str], job: JobConfig) -> int:
    """Run the trainer's verb on the devices of this machine."""
    nproc = processes(job)
    refuse_too_many(nproc)
    program = ["-m", "everstep.trainer", *words]
    argv = [sys.executable, *safe_flags(), *program]
    if nproc > 1:
        argv = torchrun.agent(program, nproc, job.grace_s, torchrun.Rendezvous(id=uuid.uuid4().hex))
    env = torchrun.environment(os.environ, threads(job, nproc), job.env)
    sys.stdout.flush()
    return subprocess.run(argv, env=env, check=False).returncode


def _add_common(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("run", metavar="RUN[@last|@best|@STEP]", help="a run, and which of its checkpoints (last)")
    add_root(parser)
    add_overrides(parser, "other data, batch or processes: data.path=…, evaluate.batch=…, job.nproc=…")
    parser.add_argument("--on", default="validation", metavar="SET", help="validation, test, train, or a set's name")
    parser.add_argument("--trust", action="store_true", help="run what the folder of another user names")
    parser.set_defaults(verb=verb)


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep evaluate",
        description="Measure a checkpoint on a whole set, each sample once, with 95 % intervals.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser, "evaluate")
    parser.add_argument("--by", default="", metavar="COLUMN", help="also each slice of the set by a column's values")
    parser.add_argument(
        "--against", default="", metavar="RUN[@…]", help="another run's checkpoint, on the same samples"
    )
    parser.add_argument(
        "--out", metavar="URL", help="folder for config and result (evaluations/NNNN in the run folder)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _predict_parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep predict",
        description="Write the task's predictions on a whole set as Parquet files, each sample exactly once.",
        epilog=PREDICT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser, "predict")
    parser.add_argument("--out", required=True, metavar="URL", help="folder for the files, on a disk or in a store")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"rows of a file ({ROWS})")
    return parser

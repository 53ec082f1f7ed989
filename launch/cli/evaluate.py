"""`everstep evaluate RUN`: measure a checkpoint of a run on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.frozen_config import start_digest
from everstep.launch.parser import Arguments
from everstep.launch.submit.trust import Runnable
from everstep.launch.trained import (
    ChosenRun,
    add_arguments,
    choose_run,
    claim_folder,
    run_trainer,
    trainer_arguments,
    write_config,
)
from everstep.run_folder import EVALUATIONS, RESULT
from everstep.storage import Storage, join_url, open_storage

EXAMPLES = """examples:
  everstep evaluate demo                          the newest checkpoint on the validation set
  everstep evaluate demo@best --on test           the best one on the test set
  everstep evaluate demo@1200 --by label          a row for each value of a column
  everstep evaluate new --against old@best        both on the same samples, with the difference
  everstep evaluate demo data.path=/data/2027     on other data
"""


def evaluate(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is that of the trainer's processes."""
    options = _parser().parse_intermixed_args(arguments)
    chosen = choose_run(options.run, options, options.overrides)
    other = choose_run(options.against, options, []) if options.against else None
    if other is not None:
        _check_code(chosen, other)
    if options.out:
        work = open_storage(options.out)
        if work.exists(RESULT):
            raise ConfigError(f"--out {options.out}: it holds a result already; choose another folder")
        return _measure(chosen, other, work, options)
    path = claim_folder(chosen, EVALUATIONS)
    work = open_storage(join_url(chosen.folder.url, path))
    try:
        return _measure(chosen, other, work, options)
    finally:
        if not work.exists(RESULT):
            chosen.folder.storage.delete(path)


def _measure(chosen: ChosenRun, other: ChosenRun | None, work: Storage, options: argparse.Namespace) -> int:
    write_config(work, chosen.config)
    argv = ["evaluate", work.url, *trainer_arguments(chosen, options.on)]
    if other is not None:
        write_config(work, other.config, "against")
        argv += ["--against", json.dumps(_described(other, work))]
    argv += ["--by", options.by] if options.by else []
    return run_trainer([*argv, *(["--json"] if options.json else [])], chosen.job)


def _check_code(chosen: ChosenRun, other: ChosenRun) -> None:
    """Raise ConfigError if the two runs have different code under one name."""
    modules = [Runnable().of_folder(run.folder.storage).module for run in (chosen, other)]
    paths = [run.job.env.get("PYTHONPATH") for run in (chosen, other)]
    if modules[0] != modules[1] or (modules == [None, None] and paths[0] != paths[1]):
        raise ConfigError(
            f"--against {other.folder.url}: it has code of its own (project/run_task.py, or job.env.PYTHONPATH); "
            "evaluate each run by itself"
        )


def _described(other: ChosenRun, work: Storage) -> dict[str, str]:
    """Return the checkpoint to compare with; it gets the samples of the first run."""
    return {
        "run": other.folder.url,
        "which": other.which,
        "config": join_url(work.url, "against"),
        "digest": start_digest(other.config),
        "plugins": ",".join(other.config.plugins),
    }


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep evaluate",
        description="Measure a checkpoint on a whole set, each sample once, with 95 % intervals.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "evaluate")
    parser.add_argument("--by", default="", metavar="COLUMN", help="also each slice of the set by a column's values")
    parser.add_argument(
        "--against", default="", metavar="RUN[@…]", help="another run's checkpoint, on the same samples"
    )
    parser.add_argument(
        "--out", metavar="URL", help="folder for config and result (evaluations/NNNN in the run folder)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser

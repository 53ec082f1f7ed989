"""Measurement of a run's checkpoint, alone or beside another run's on the same samples."""

from __future__ import annotations

import json

from everstep.errors import ConfigError
from everstep.frozen_config import start_digest
from everstep.launch.submit.trust import Runnable
from everstep.launch.trained import ChosenRun, run_trainer, trainer_arguments, write_config
from everstep.storage import Storage, join_url


def measure(
    chosen: ChosenRun, other: ChosenRun | None, work: Storage, on: str, by: str = "", as_json: bool = False
) -> int:
    """Write the result into the folder `work`, and return the exit code of the trainer's processes.

    Args:
        other: a run to compare with; it gets the samples of the first one.
        on: the set: validation, test, train, or a set's name.
        by: a column by whose values the set is sliced too.
        as_json: print the result as JSON instead of a table.
    """
    write_config(work, chosen.config)
    argv = ["evaluate", work.url, *trainer_arguments(chosen, on)]
    if other is not None:
        write_config(work, other.config, "against")
        argv += ["--against", json.dumps(_described(other, work))]
    argv += ["--by", by] if by else []
    return run_trainer([*argv, *(["--json"] if as_json else [])], chosen.job)


def check_code(chosen: ChosenRun, other: ChosenRun) -> None:
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

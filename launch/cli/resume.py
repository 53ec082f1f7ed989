"""`everstep resume RUN`: resume a run from its folder, as a job or on this machine, as it was started."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from typing import Any

from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import freeze, settle, thaw
from everstep.launch.cli.run import start
from everstep.launch.config import JobConfig, job_config, processes, refuse_too_many
from everstep.launch.console import say
from everstep.launch.parser import Arguments, add_overrides
from everstep.launch.preflight.checks import refuse
from everstep.launch.preflight.model import rehearse, worlds
from everstep.launch.runs.history import History, read
from everstep.launch.runs.lookup import add_run, find
from everstep.launch.runs.state import RunState
from everstep.launch.runs.summary import RunSummary, summary
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.registry import scheduler
from everstep.launch.submit.override_frozen import amend
from everstep.launch.submit.records import submissions, submit
from everstep.launch.submit.snapshot import open_code
from everstep.launch.sweep.sweep_folder import sweep_at
from everstep.run_folder import CONFIG, JOB, RunFolder

EXAMPLES = """examples:
  everstep resume demo                      go on from the last checkpoint
  everstep resume demo steps=2000           the run gets longer
  everstep resume demo job.nodes=2          on other machines
  everstep resume demo job=local            here, whatever it was started as
  everstep resume demo plugins=[my_package] your own package is named again: a run folder's word is not enough
"""


def resume(arguments: Sequence[str]) -> int:
    """Run the verb; return the exit code of the run, or 0 when it was submitted."""
    options = _parser().parse_intermixed_args(arguments)
    if (sweep := sweep_at(options.run, options.root)) is not None:
        from everstep.launch.sweep import status  # imported for a sweep only, to keep start-up fast

        return status.resume(sweep, options.overrides, options.failed)
    folder = find(options.run, options.root)
    config, job = _changed(folder, options.overrides, options.config_dir)
    _refuse_unnamed_plugins(config, options.overrides)
    history = read(folder)
    here = summary(history)
    if _goes_on(here) and not _is_unknown_submission(history) and not (here.job and here.job.worn):
        raise ConfigError(f"run {history.name} is {here.standing.state.value} already; 'everstep cancel' stops it")
    last = history.last.ending if history.last else None
    if last is not None and last.is_done(config.steps, config.evaluate.patience):
        say(f"run {history.name} is done: step {last.step} of {config.steps}; give a larger steps= to go on")
        return 0
    for world in worlds(config, job):
        config.parallel.check_world(world)
    if job.scheduler == "local":
        nproc = processes(job)
        refuse_too_many(nproc)
        _settle(config, folder)
        return start(config, job, nproc, folder)
    is_changed = any(not word.startswith("plugins=") for word in options.overrides)
    return _submit(config, job, folder, is_changed and not options.quick)


def _submit(config: RunConfig, job: JobConfig, folder: RunFolder, rehearsed: bool) -> int:
    """Submit the run as a job.

    Args:
        rehearsed: build its parts first; needless when nothing has changed.
    """
    cluster = scheduler(job.scheduler, job)
    submitted = program(config, folder)
    refuse(cluster.problems(job, submitted))
    seen = submissions(folder)
    # The code that the run was submitted with, regardless of later changes of the checkout.
    place = seen[-1].intent.get("code") if seen else None
    code = open_code(folder, place) if rehearsed and place is not None else None
    if rehearsed and (failed := rehearse(config, job, brief=True, code=code)):
        return failed
    _settle(config, folder)
    receipt = submit(folder, job, submitted, cluster, place)
    print(f"{config.run} in {folder.url}: {receipt.handle}")
    return 0


def _settle(config: RunConfig, folder: RunFolder) -> None:
    for change in settle(config, folder):
        say(f"changed since the last start: {change}")


def program(config: RunConfig, folder: RunFolder) -> Program:
    """Return the program that nodes start: the trainer, with the frozen config of the run folder."""
    named = ["--plugins", ",".join(config.plugins)] if config.plugins else []
    argv = ("-m", "everstep.trainer", "--frozen", folder.storage.url, *named)
    return Program(str(config.run), folder.storage.url, argv, uuid.uuid4().hex, freeze(config))


def _changed(folder: RunFolder, overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[RunConfig, JobConfig]:
    import yaml

    try:
        config = thaw(folder.storage.read(CONFIG).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"{folder.url} has no {CONFIG}: there is nothing that could go on") from error
    try:
        job: Any = yaml.safe_load(folder.storage.read(JOB))
    except FileNotFoundError:  # torchrun started it, without the launcher
        job = {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder.url}/{JOB} is damaged: {str(error).splitlines()[0]}") from error
    changed, changed_job = amend(config, job or {}, overrides, config_dirs)
    return changed, job_config(changed_job)


def _refuse_unnamed_plugins(config: RunConfig, overrides: Sequence[str]) -> None:
    """Require `plugins=` on the command line: write access to a run folder must not be enough to run code."""
    if config.plugins and not any(text.startswith("plugins=") for text in overrides):
        raise ConfigError(
            f"the run uses packages of its own ({', '.join(config.plugins)}); if you trust this run folder, add "
            f"'plugins=[{','.join(config.plugins)}]'"
        )


def _goes_on(here: RunSummary) -> bool:
    # A silent run on another machine may be dead. If it is alive, its next save fails as superseded.
    return not here.standing.state.is_over and here.standing.state not in (RunState.new, RunState.silent)


def _is_unknown_submission(history: History) -> bool:
    """True if a launcher died between the intent and the job; `submit` then finds out if a job exists."""
    return bool(history.submissions) and not history.submissions[-1].is_settled


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep resume",
        description="Go on with a run from its last checkpoint, as its job.yaml says.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    add_overrides(parser, "what changes; see docs/resuming.md")
    parser.add_argument("--failed", action="store_true", help="of a sweep: what has failed or was cancelled, too")
    parser.add_argument("--quick", action="store_true", help="do not build a changed model before it is submitted")
    return parser

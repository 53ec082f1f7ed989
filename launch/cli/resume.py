"""`everstep resume RUN`: resume a run from its folder, as a job or on this machine, as it was started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import freeze, settle, start_digest, thaw
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
from everstep.launch.schedulers.job import new_token
from everstep.launch.schedulers.registry import scheduler
from everstep.launch.submit.job_spec import read_job
from everstep.launch.submit.override_frozen import amend
from everstep.launch.submit.snapshot import open_code
from everstep.launch.submit.submission import submissions, submit
from everstep.launch.submit.trust import Runnable, refuse_foreign
from everstep.launch.sweep.sweep_folder import sweep_at
from everstep.launch.torchrun import trainer
from everstep.run_folder import CONFIG, RunFolder

EXAMPLES = """examples:
  everstep resume demo                      go on from the last checkpoint
  everstep resume demo steps=2000           the run gets longer
  everstep resume demo job.nodes=2          on other machines
  everstep resume demo job=local            here, whatever it was started as
  everstep resume /shared/demo --trust      run what the folder of another user names
"""


def resume(arguments: Sequence[str]) -> int:
    """Run the verb; return the exit code of the run, or 0 when it was submitted."""
    options = _parser().parse_intermixed_args(arguments)
    if (sweep := sweep_at(options.run, options.root)) is not None:
        from everstep.launch.sweep import status  # imported for a sweep only, to keep start-up fast

        return status.resume(sweep, options.overrides, options.failed, options.trust)
    folder = find(options.run, options.root)
    config, job = _changed(folder, options)
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
    code = open_code(folder, submitted.code, job.code_mb) if rehearsed and submitted.code is not None else None
    if rehearsed and (failed := rehearse(config, job, brief=True, code=code)):
        return failed
    _settle(config, folder)
    receipt = submit(folder, job, submitted, cluster)
    print(f"{config.run} in {folder.url}: {receipt.handle}")
    return 0


def _settle(config: RunConfig, folder: RunFolder) -> None:
    for change in settle(config, folder):
        say(f"changed since the last start: {change}")


def program(config: RunConfig, folder: RunFolder) -> Program:
    """Return the program that nodes start: the trainer, with the frozen config of the run folder."""
    url = folder.storage.url
    argv = tuple(trainer(url, config.plugins, start_digest(config)))
    plugins = tuple(config.plugins)
    return Program(str(config.run), url, argv, new_token(url), freeze(config), plugins, code_place(folder))


def code_place(folder: RunFolder) -> str | None:
    """Return the code that the run was submitted with, regardless of later changes of the checkout."""
    seen = submissions(folder)
    return seen[-1].intent.get("code") if seen else None


def _changed(folder: RunFolder, options: argparse.Namespace) -> tuple[RunConfig, JobConfig]:
    """Return the run and its job after the command line's changes; refuse code that is not trusted."""
    try:
        config = thaw(folder.storage.read(CONFIG))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder.url} has no {CONFIG}: there is nothing that could go on") from error
    try:
        job = read_job(folder)
    except FileNotFoundError:  # torchrun started it, without the launcher
        job = {}
    changed, changed_job = amend(config, job, options.overrides, options.config_dir)
    _, said_job = amend(config, {}, options.overrides, options.config_dir)
    named = changed.plugins if any(word.startswith("plugins=") for word in options.overrides) else ()
    final, said = job_config(changed_job), job_config(said_job)
    code = None if final.scheduler == "local" else code_place(folder)
    refuse_foreign(
        folder.storage,
        recorded=Runnable.of(job_config(job), config.plugins, code).of_folder(folder.storage),
        used=Runnable.of(final, changed.plugins, code).of_folder(folder.storage),
        said=Runnable.of(said, named),
        trusted=options.trust,
    )
    return changed, final


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
    parser.add_argument("--trust", action="store_true", help="run what the folder of another user names")
    parser.add_argument("--failed", action="store_true", help="of a sweep: what has failed or was cancelled, too")
    parser.add_argument("--quick", action="store_true", help="do not build a changed model before it is submitted")
    return parser

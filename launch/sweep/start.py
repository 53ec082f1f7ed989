"""Start or resume a sweep: preflight checks first, then the driver until no trial is left."""

from __future__ import annotations

from everstep.compose import Composed
from everstep.frozen_config import freeze
from everstep.launch.config import job_yaml
from everstep.launch.console import say
from everstep.launch.job_start.signals import Signals
from everstep.launch.preflight.checks import check, refuse
from everstep.launch.preflight.model import rehearse
from everstep.launch.schedulers.registry import scheduler
from everstep.launch.submit.trust import Runnable, sign
from everstep.launch.sweep.display import shower
from everstep.launch.sweep.driver import Driver
from everstep.launch.sweep.leaderboard import print_rows, ranked
from everstep.launch.sweep.lease import take
from everstep.launch.sweep.plan import Plan, settle
from everstep.launch.sweep.state import SweepState, Trial, TrialOutcome
from everstep.launch.sweep.suggest import Suggester
from everstep.launch.sweep.sweep_folder import keep
from everstep.launch.sweep.workers import Workers
from everstep.launch.sweep.workers_cluster import ClusterWorkers
from everstep.launch.sweep.workers_local import LocalWorkers

SHOWN = 20
"""Trials that a dry run lists."""


def drive(made: Plan, again: bool = False, quick: bool = False) -> int:
    """Freeze the plan, take the lease and run the driver to the end; return the exit code.

    Args:
        again: retry trials that failed or were cancelled.
        quick: on a cluster, do not build a trial's parts before the first is submitted.

    Raises:
        ConfigError: the cluster would refuse the trials, or the folder holds a different sweep.
    """
    if made.job.scheduler != "local" and (code := _preflight(made, quick)):
        return code
    made = settle(made)
    lease = take(made.folder.storage)
    try:
        story = made.folder.story()
        anew = made.folder.go_on()
        for trial in [each for each in story.trials if again and _has_failed(each)]:
            made.folder.append(story, {"event": "again", "trial": trial.number})
        say(f"sweep {made.folder.name} in {made.folder.url}: {len(story.trials)} trials so far")
        with Signals() as signals, shower(made) as show:
            code = Driver(made, story, workers(made), lease, signals, show, anew).run()
    finally:
        lease.release()
    print_rows(made, ranked(made, story), made.metrics)
    return code


def _has_failed(trial: Trial) -> bool:
    return trial.last is not None and trial.last.verdict in (TrialOutcome.failed, TrialOutcome.cancelled)


def _preflight(made: Plan, quick: bool) -> int:
    """Check the trials before anything is written; return the exit code.

    Only the first trial is checked: an error in the values of another fails that trial, and the sweep continues.
    """
    story = made.folder.story()
    found = None if story.trials else Suggester(made, story).next(story)
    if found is None:  # on resume, earlier jobs have shown that the trials run
        refuse(scheduler(made.job.scheduler, made.job).problems(made.job))
        return 0
    record, _ = found
    config = made.config(record["values"], record["name"], record["rung"])
    refuse(check(Composed(config, {}, None), made.job))
    return 0 if quick else rehearse(config, made.job, brief=True)


def workers(made: Plan) -> Workers:
    """Return the local or the cluster back end that runs the trials."""
    code = keep(made.folder, made.plugins, made.job)
    sign(made.folder.storage, Runnable.of(made.job, made.plugins, None if code is None else code.place))
    if made.job.scheduler == "local":
        return LocalWorkers(made.job, made.any_config, code=code)
    return ClusterWorkers(made.job, scheduler(made.job.scheduler, made.job), code, made.folder)


def dry_run(made: Plan) -> int:
    """Print the trials that can be suggested without results, and the first config."""
    story = SweepState()
    asking = Suggester(made, story)
    while (found := asking.next(story)) is not None:
        record, number = found
        made.config(record["values"], record["name"], record["rung"])
        story.apply(record)
        asking.know(story.trials[-1], number)
    for trial in story.trials[:SHOWN]:
        print(trial.name)
    more = f"… and {len(story.trials) - SHOWN} more\n" if len(story.trials) > SHOWN else ""
    steps = sum(made.steps(made.config(trial.values, trial.name, 0))[-1] for trial in story.trials)
    print(f"{more}{len(story.trials)} trials in {made.folder.url}, {steps:,} steps if none is cut short\n")
    if story.trials:
        first = story.trials[0]
        config = freeze(made.config(first.values, first.name, first.rung))
        print(f"# {first.name}/config.yaml\n{config}\n# job.yaml\n{job_yaml(made.job)}", end="")
    return 0

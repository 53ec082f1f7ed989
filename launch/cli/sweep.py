"""`everstep sweep`: compose once, then drive trials until all are told; the same command goes on where it stopped."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everstep.compose import Composed, freeze
from everstep.launch.cli.submit import refuse
from everstep.launch.config import job_yaml
from everstep.launch.job_start.process import Signals
from everstep.launch.messages import say
from everstep.launch.parser import Arguments
from everstep.launch.preflight.checks import check
from everstep.launch.preflight.model import rehearse
from everstep.launch.schedulers.registry import scheduler
from everstep.launch.sweep.code import keep
from everstep.launch.sweep.display import shower
from everstep.launch.sweep.driver import Driver
from everstep.launch.sweep.leaderboard import print_rows, ranked
from everstep.launch.sweep.lease import take
from everstep.launch.sweep.plan import Plan, plan, settle
from everstep.launch.sweep.state import Story, Trial, Verdict
from everstep.launch.sweep.suggest import Asking
from everstep.launch.sweep.workers import Workers
from everstep.launch.sweep.workers_cluster import Jobs
from everstep.launch.sweep.workers_local import Here

EXAMPLES = """examples:
  everstep sweep experiment=digits optimizer.lr=1e-4,3e-4,1e-3 'seed=range(0,3)' job.max_parallel=4
  everstep sweep job=slurm job.max_parallel=8 experiment=mine optimizer=adamw,sgd 'model.depth=choice(4,8)'
  everstep sweep sweep.sampler=tpe sweep.pruner=asha sweep.trials=64 experiment=mine \\
                 'optimizer.lr=tag(log,interval(1e-5,1e-2))'
  everstep sweep sweep=NAME experiment=mine                what is too long for a line, from conf/sweep/NAME.yaml
  everstep sweep --dry-run …                               the trials, and the config of the first; nothing is written

Ctrl-C stops; the same command, or everstep resume SWEEP, goes on. Trials that were done are not done again.
exit codes: 0 all trials are told, 1 sweep.max_failures, 2 the sweep cannot run, 4 another driver took over, 75 stopped
"""
SHOWN = 20
"""Trials that a dry run lists."""


def sweep(arguments: Sequence[str]) -> int:
    """The verb."""
    options = _parser().parse_intermixed_args(arguments)
    made = plan(options.overrides, options.config_dir)
    if options.dry_run:
        return _dry_run(made)
    return drive(made, quick=options.quick)


def drive(made: Plan, again: bool = False, quick: bool = False) -> int:
    """Freeze the plan, take the lease, and go on until nothing is left; the exit code.

    Args:
        again: what has failed or was cancelled is tried once more.
        quick: on a cluster, do not build a trial's parts before the first is submitted.

    Raises:
        ConfigError: the cluster would refuse the trials, or it is another sweep.
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
    return trial.last is not None and trial.last.verdict in (Verdict.failed, Verdict.cancelled)


def _preflight(made: Plan, quick: bool) -> int:
    """What stands against the trials, before anything is written; the exit code.

    The first trial stands for all: what the values of others do they tell themselves, and the sweep goes on.
    """
    story = made.folder.story()
    found = None if story.trials else Asking(made, story).next(story)
    if found is None:  # of a sweep that goes on the jobs themselves have shown it
        refuse(scheduler(made.job.scheduler, made.job).problems(made.job))
        return 0
    record, _ = found
    config = made.config(record["values"], record["name"], record["rung"])
    refuse(check(Composed(config, {}, None), made.job))
    return 0 if quick else rehearse(config, made.job, brief=True)


def workers(made: Plan) -> Workers:
    """Where the trials run."""
    code = keep(made.folder, made.any_config.plugins, made.job.code_mb)
    if made.job.scheduler == "local":
        return Here(made.job, made.any_config, code=code)
    return Jobs(made.job, scheduler(made.job.scheduler, made.job), code, made.folder)


def _dry_run(made: Plan) -> int:
    """What would be asked, as far as it is known before anything was told."""
    story = Story()
    asking = Asking(made, story)
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


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep sweep",
        usage="everstep sweep [--dry-run] [--quick] [--config-dir DIR] key=value key=value,value …",
        description="Train with every one of several values, or with those that a sampler chooses.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs; several values make a sweep")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="your own folder of configs")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and start nothing")
    parser.add_argument("--quick", action="store_true", help="on a cluster: do not build a trial's model before")
    return parser

"""`everstep sweep`: compose once, then run all trials; the same command resumes where it stopped."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everstep.launch.parser import Arguments, add_overrides
from everstep.launch.sweep.plan import plan
from everstep.launch.sweep.start import drive, dry_run

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


def sweep(arguments: Sequence[str]) -> int:
    """Run the verb."""
    options = _parser().parse_intermixed_args(arguments)
    made = plan(options.overrides, options.config_dir)
    if options.dry_run:
        return dry_run(made)
    return drive(made, quick=options.quick)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep sweep",
        usage="everstep sweep [--dry-run] [--quick] [--config-dir DIR] key=value key=value,value …",
        description="Train with every one of several values, or with those that a sampler chooses.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_overrides(parser, "what differs; several values make a sweep")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and start nothing")
    parser.add_argument("--quick", action="store_true", help="on a cluster: do not build a trial's model before")
    return parser

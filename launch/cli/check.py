"""`everstep check`: report all problems that show before the queue, each with the key to change."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig, job_config
from everstep.launch.console import say
from everstep.launch.parser import Arguments, add_overrides, refuse_script
from everstep.launch.preflight.checks import check
from everstep.launch.preflight.config_errors import composed_or_mistakes
from everstep.launch.preflight.model import rehearse

EXAMPLES = """examples:
  everstep check experiment=gpt_stdlib parallel=fsdp job.nproc=8
  everstep check job=slurm job.nodes=16 job.time=24h experiment=mine --config-dir conf
  everstep check --quick job=slurm experiment=mine       what needs no torch, in under a second

exit codes: 0 no problem found, 2 a problem found
"""


def run(arguments: Sequence[str]) -> int:
    """Run the verb: checks without torch first, then the trainer's part in its own process."""
    refuse_script(arguments, "check")
    options = _parser().parse_intermixed_args(arguments)
    composed, found = composed_or_mistakes(options.overrides, options.config_dir)
    job = JobConfig() if composed is None else job_config(composed.job)
    if composed is not None:
        found = check(composed, job)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    code = ConfigError.exit_code if found else 0
    if composed is None:
        return code
    if not options.quick:
        return max(code, rehearse(composed.run, job, brief=bool(found), known=found))
    if not code:
        say("no problem found without torch; leave out --quick to build the model too")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep check",
        description="All that can be known before a run starts: every problem is listed, nothing is started.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_overrides(parser)
    parser.add_argument("--quick", action="store_true", help="only what needs no torch")
    return parser

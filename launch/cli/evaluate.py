"""`everstep evaluate RUN`: measure a checkpoint of a run on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.launch.evaluation import check_code, measure
from everstep.launch.parser import Arguments
from everstep.launch.trained import add_arguments, choose_run, claim_folder
from everstep.run_folder import EVALUATIONS, RESULT
from everstep.storage import join_url, open_storage

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
        check_code(chosen, other)
    if options.out:
        work = open_storage(options.out)
        if work.exists(RESULT):
            raise ConfigError(f"--out {options.out}: it holds a result already; choose another folder")
        return measure(chosen, other, work, options.on, options.by, options.json)
    path = claim_folder(chosen, EVALUATIONS)
    work = open_storage(join_url(chosen.folder.url, path))
    try:
        return measure(chosen, other, work, options.on, options.by, options.json)
    finally:
        if not work.exists(RESULT):
            chosen.folder.storage.delete(path)


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

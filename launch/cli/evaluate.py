"""`everstep evaluate RUN`: measure a checkpoint of a run on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from everstep.frozen_config import freeze, start_digest
from everstep.launch.parser import Arguments
from everstep.launch.trained import Chosen, add_arguments, choose, put, start, words
from everstep.run_folder import CONFIG, EVALUATIONS
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
    chosen = choose(options.run, options, options.overrides)
    path = ""
    if options.out:
        work = open_storage(options.out)
        put(work, "", chosen.config)
    else:
        path = _new_evaluation(chosen)
        work = open_storage(join_url(chosen.folder.url, path))
    argv = ["evaluate", work.url, *words(chosen, options.on)]
    if options.against:
        argv += ["--against", json.dumps(_other(options, work))]
    argv += ["--by", options.by] if options.by else []
    code = start([*argv, *(["--json"] if options.json else [])], chosen.job)
    if code and path:
        chosen.folder.storage.delete(path)
    return code


def _new_evaluation(chosen: Chosen) -> str:
    """Claim the next folder of an evaluation, by the config in it; return its name in the run folder."""
    storage, text = chosen.folder.storage, freeze(chosen.config).encode()
    number = max((int(name) for name in storage.names(EVALUATIONS) if name.isdigit()), default=0) + 1
    while not storage.create(f"{EVALUATIONS}/{number:04d}/{CONFIG}", text):
        number += 1
    return f"{EVALUATIONS}/{number:04d}"


def _other(options: argparse.Namespace, work: Storage) -> dict[str, str]:
    """Return the checkpoint to compare with; it gets the samples of the first run."""
    other = choose(options.against, options, [])
    put(work, "against", other.config)
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

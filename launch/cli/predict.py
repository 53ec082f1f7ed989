"""`everstep predict RUN`: write the predictions of a checkpoint on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.launch.parser import Arguments
from everstep.launch.trained import add_arguments, choose_run, run_trainer, trainer_arguments, write_config
from everstep.storage import join_url, open_storage

ROWS = 100_000
HIDDEN = "_everstep"
"""Folder of config and plan beside predictions: readers of Parquet folders ignore such names."""
EXAMPLES = """examples:
  everstep predict demo@best --out predictions/           a folder of Parquet files
  everstep predict demo --out s3://bucket/p --on train    the same command again goes on where it was killed
"""


def predict(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is that of the trainer's processes."""
    options = _parser().parse_intermixed_args(arguments)
    if options.rows < 1:
        raise ConfigError(f"--rows {options.rows}: a part has at least one row")
    chosen = choose_run(options.run, options, options.overrides)
    work = open_storage(join_url(options.out, HIDDEN))
    write_config(work, chosen.config)
    argv = [
        "predict",
        work.url,
        *trainer_arguments(chosen, options.on),
        "--out",
        options.out,
        "--rows",
        str(options.rows),
    ]
    return run_trainer(argv, chosen.job)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep predict",
        description="Write the task's predictions on a whole set as Parquet files, each sample exactly once.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "predict")
    parser.add_argument("--out", required=True, metavar="URL", help="folder for the files, on a disk or in a store")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"rows of a file ({ROWS})")
    return parser

"""`everstep sync RUN --to TRACKER`: write what a run folder has into W&B, TensorBoard, MLflow or trackio."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import add_run, find

TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")


def sync(arguments: Sequence[str]) -> int:
    """Find the run, and become the trainer's process that writes."""
    from everstep.import_path import safe_flags

    options = _parser().parse_args(arguments)
    url = find(options.run, options.root).url
    words = [sys.executable, *safe_flags(), "-m", "everstep.trainer", "sync", url, "--to", options.to]
    sys.stdout.flush()
    os.execv(sys.executable, words)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep sync",
        description="Write the metrics of all attempts into a tracker; what it has already stays as it is.",
    )
    add_run(parser)
    parser.add_argument("--to", required=True, choices=TRACKERS, help="the tracker, with the options of the run's log")
    return parser

"""`everstep explain RUN`: attribute a checkpoint's outputs to the inputs of samples, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.launch.parser import Arguments
from everstep.launch.trained import add_arguments, choose_run, claim_folder, run_trainer, trainer_arguments
from everstep.run_folder import EXPLANATIONS, RESULT
from everstep.storage import join_url

METHODS = ("integrated_gradients", "gradient_x_input", "occlusion")
SAMPLES, POINTS = "8", 64
EXAMPLES = """examples:
  everstep explain demo@best                          eight samples of the validation set
  everstep explain demo --samples 3,17 --target 1     these two, for output 1
  everstep explain demo --on test --method occlusion
"""


def explain(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is that of the trainer's process."""
    options = _parser().parse_intermixed_args(arguments)
    if options.points < 2:
        raise ConfigError(f"--points {options.points}: a path has at least 2 points")
    chosen = choose_run(options.run, options, options.overrides)
    path = claim_folder(chosen, EXPLANATIONS)
    work = join_url(chosen.folder.url, path)
    argv = ["explain", work, *trainer_arguments(chosen, options.on), "--samples", options.samples]
    argv += ["--method", options.method, "--points", str(options.points)]
    argv += ["--target", str(options.target)] if options.target is not None else []
    # A sharded model is read on one process and on the CPU, which has the most memory.
    job = dataclasses.replace(chosen.job, nproc=1, env={**chosen.job.env, "CUDA_VISIBLE_DEVICES": ""})
    try:
        return run_trainer(argv, job)
    finally:
        if not chosen.folder.storage.exists(f"{path}/{RESULT}"):
            chosen.folder.storage.delete(path)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep explain",
        description="Write by how much each input of a sample changed an output, against inputs of zero.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "explain")
    parser.add_argument("--samples", default=SAMPLES, metavar="N|IDS", help=f"the first N, or ids as 3,17 ({SAMPLES})")
    parser.add_argument("--method", default=METHODS[0], choices=METHODS, help=f"({METHODS[0]})")
    parser.add_argument("--points", type=int, default=POINTS, metavar="N", help=f"points of the path ({POINTS})")
    parser.add_argument("--target", type=int, metavar="K", help="number of the output (the greatest one)")
    return parser

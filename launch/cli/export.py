"""`everstep export RUN`: write a checkpoint's model in a format that other programs read."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from everstep.errors import ConfigError
from everstep.launch.parser import Arguments
from everstep.launch.trained import add_arguments, choose_run, run_trainer, trainer_arguments, write_config
from everstep.storage import open_storage

FORMATS = {
    "safetensors": "the weights as one file",
    "hf": "the weights as files of at most 5 GB and an index, as Hugging Face does",
    "pt2": "a program of torch.export, which runs without the model's code",
    "onnx": "a graph for ONNX Runtime and others",
    "torchscript": "a trace, which torch has deprecated",
}
EXAMPLES = """examples:
  everstep export demo@best --format pt2 --out model/
  everstep export demo --format safetensors --dtype bf16 --out weights/
  everstep export demo --format hf evaluate.weights=ema --out weights/     the moving average
"""


def export(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is that of the trainer's process."""
    options = _parser().parse_intermixed_args(arguments)
    out = Path(options.out).absolute()
    if out.exists():
        raise ConfigError(f"--out {options.out}: it is there already; choose another folder")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {out.parent}; make it, or choose another")
    chosen = choose_run(options.run, options, options.overrides)
    with tempfile.TemporaryDirectory() as work:
        write_config(open_storage(work), chosen.config)
        argv = ["export", work, *trainer_arguments(chosen, options.on), "--out", str(out), "--format", options.format]
        argv += ["--dtype", options.dtype] if options.dtype else []
        # A sharded model is read on one process and on the CPU, which has the most memory.
        job = dataclasses.replace(chosen.job, nproc=1, env={**chosen.job.env, "CUDA_VISIBLE_DEVICES": ""})
        return run_trainer(argv, job)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12} {meaning}" for name, meaning in FORMATS.items())
    parser = Arguments(
        prog="everstep export",
        description="Write the model of a checkpoint, load it again without Everstep, and compare on real samples.",
        epilog=f"formats:\n{listed}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "export")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see below")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder on this machine")
    parser.add_argument("--dtype", choices=("fp64", "fp32", "bf16", "fp16"), help="type of the weights (as trained)")
    return parser

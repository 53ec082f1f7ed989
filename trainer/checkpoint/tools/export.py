"""Export of a checkpoint's model weights as one safetensors file, which other programs can read."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from everstep.errors import ConfigError
from everstep.run_folder import RunFolder
from everstep.storage import join_url
from everstep.trainer.checkpoint.tensor_index import read_metadata, read_whole

WEIGHTS = {"model": "model.", "ema": "average."}
"""Prefix of the weights to export: the trained ones, or their moving average."""


def export(run: RunFolder, path: str, weights: str, to: str) -> int:
    """Write the file (a local path); return the number of tensors in it."""
    if importlib.util.find_spec("safetensors") is None:
        raise ConfigError("export writes safetensors, which is not installed: pip install 'everstep[export]'")
    from safetensors.torch import save_file

    target = Path(to)
    if target.exists():
        raise ConfigError(f"{to} is there already; choose another file")
    metadata, prefix = read_metadata(run.storage, path), WEIGHTS[weights]
    names = sorted(name for name in metadata.state_dict_metadata if name.startswith(prefix))
    if not names:
        raise ConfigError(f"{join_url(run.url, path)} has no moving average (ema); use --weights model")
    tensors = {n.removeprefix(prefix): read_whole(run.storage, path, metadata, n) for n in names}
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.part")
    try:
        save_file(tensors, staged, {"everstep": join_url(run.url, path), "weights": weights})
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)
    return len(tensors)

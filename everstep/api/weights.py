"""Weights of a checkpoint in a model on the CPU, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from everstep.config import RunConfig
from everstep.errors import CheckpointError, ConfigError
from everstep.run_folder import RunFolder
from everstep.storage import join_url
from everstep.trainer.build import build_task
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tensor_index import read_metadata, read_whole
from everstep.trainer.checkpoint.tools.diff import WEIGHTS
from everstep.trainer.checkpoint.tools.inventory import committed

LAST, BEST = "last", "best"


def trained_model(
    folder: RunFolder, config: RunConfig, which: str | int, make: Callable[[], nn.Module] | None
) -> nn.Module:
    """Return the model with the weights of a checkpoint.

    Args:
        which: last, best or a step.
        make: returns a model; None takes the config's task, whose package must be importable.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    run, path = _checkpoint(folder, which)
    with torch.random.fork_rng(devices=[]):
        model = make() if make is not None else build_task(config).model()
    metadata, prefix = read_metadata(run.storage, path), WEIGHTS["model"]
    names = [name for name in metadata.state_dict_metadata if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): read_whole(run.storage, path, metadata, name) for name in names}
    missing, unknown = _load(model, tensors)
    if missing or unknown:
        raise CheckpointError(f"{join_url(run.url, path)} does not fit the model: {(missing + unknown)[0]}")
    return model.eval()


def _load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    found: Any = model.load_state_dict(tensors, strict=False)
    shared = {id(value) for name, value in model.state_dict(keep_vars=True).items() if name in tensors}
    state = model.state_dict(keep_vars=True)  # tied weights are saved once
    return [name for name in found.missing_keys if id(state[name]) not in shared], list(found.unexpected_keys)


def _checkpoint(folder: RunFolder, which: str | int) -> tuple[RunFolder, str]:
    if which in (LAST, BEST):
        return locate(folder.url if which == LAST else join_url(folder.url, BEST))
    run, found = committed(folder.url)
    steps = {checkpoint.step: checkpoint.path for checkpoint in found}
    if which not in steps:
        raise ConfigError(f"which={which!r}: choose last, best or a step: {', '.join(map(str, sorted(steps)))}")
    return run, steps[int(which)]

"""Weights of another run for a new one: all of them, or those that match patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.checkpoint import metadata as dcp

from everstep.errors import CheckpointError, ConfigError
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.load import open_checkpoint, pack_ref, unpack_ref
from everstep.trainer.checkpoint.manifest import CheckpointRef
from everstep.trainer.checkpoint.read import DamagedError, fill
from everstep.trainer.checkpoint.restore import choose
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.model_state import ModelState

PREFIX = "model."
SHOWN = 3
"""Names that a message lists; the others are counted."""


def load_weights(url: str, model: nn.Module, mesh: Mesh, match: Sequence[str] = ("*",)) -> str:
    """Fill the model's tensors that match a pattern from a checkpoint, or from the newest one of a run.

    Return one line: the checkpoint, the number of weights, those left new and those not used.

    Raises:
        ConfigError: a pattern matches none of the model's weights.
        CheckpointError: no checkpoint verifies, or names and shapes differ.
    """
    tensors = {f"{PREFIX}{n}": value for n, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    wanted = _wanted(tensors, match)
    faults = []
    for packed in mesh.decide(lambda: [{"folder": folder.url, **pack_ref(found)} for folder, found in choose(url)]):
        folder, found = RunFolder(packed["folder"]), unpack_ref(packed)
        try:
            there = _take(url, folder, found, wanted, model, match, mesh)
        except DamagedError as error:
            faults.append(f"{found.path}: {error}")
            continue
        new, left = tensors.keys() - wanted.keys(), there - wanted.keys()
        line = f"{folder.url}/{found.path}: {len(wanted)} of {len(tensors)} weights"
        return line + (f"; not taken: {_some(new)}" if new else "") + (f"; left there: {_some(left)}" if left else "")
    if not faults:
        raise CheckpointError(
            f"init_from={url} has no checkpoint of Everstep; weights of another kind (safetensors, Hugging Face) are "
            "loaded by the task itself, in model()"
        )
    raise CheckpointError(f"init_from={url} has no checkpoint that can be read ({'; '.join(faults)})")


def _take(
    url: str,
    folder: RunFolder,
    found: CheckpointRef,
    wanted: dict[str, torch.Tensor],
    model: nn.Module,
    match: Sequence[str],
    mesh: Mesh,
) -> set[str]:
    """Fill the tensors; return the names of all weights in the checkpoint."""
    source = open_checkpoint(folder.storage, found, mesh)
    _check_fit(url, wanted, source.metadata)
    values = source.manifest.values.get("model", {})
    known = model.state_dict().keys()
    values = {n: packed for n, packed in values.items() if n in known and any(fnmatchcase(n, p) for p in match)}
    state = ModelState(model)
    targets = state.allocate(source.metadata, values, [*(name.removeprefix(PREFIX) for name in wanted), *values])
    mesh.together(lambda: fill(targets, source, mesh.rank))
    mesh.together(lambda: state.load(values))
    return {name for name in source.metadata.state_dict_metadata if name.startswith(PREFIX)}


def _wanted(tensors: dict[str, torch.Tensor], match: Sequence[str]) -> dict[str, torch.Tensor]:
    names = [name.removeprefix(PREFIX) for name in tensors]
    for pattern in match:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"init_match: {pattern!r} matches no weight of the model, which has {_some(tensors)}")
    return {
        f"{PREFIX}{name}": tensors[f"{PREFIX}{name}"]
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in match)
    }


def _check_fit(url: str, wanted: dict[str, torch.Tensor], metadata: dcp.Metadata) -> None:
    for name, tensor in wanted.items():
        entry = metadata.state_dict_metadata.get(name)
        if entry is None or getattr(entry, "size", None) != tensor.shape:
            size = "is missing" if entry is None else f"is {list(getattr(entry, 'size', []))}"
            raise CheckpointError(
                f"init_from={url}: {name} {size} there, {list(tensor.shape)} in the model; "
                "name the weights to take with init_match"
            )


def _some(names: Iterable[str]) -> str:
    plain = sorted(name.removeprefix(PREFIX) for name in names)
    more = f" and {len(plain) - SHOWN} more" if len(plain) > SHOWN else ""
    return ", ".join(plain[:SHOWN]) + more

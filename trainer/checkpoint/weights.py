"""Weights of another run for a new one: all of them, or those that match patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.tensor import DTensor, Replicate

from everstep.errors import CheckpointError, ConfigError
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.foreign_weights import ForeignTensor, ForeignWeights, open_foreign
from everstep.trainer.checkpoint.key_map import read_map, renamed
from everstep.trainer.checkpoint.load import open_checkpoint, pack_ref, unpack_ref
from everstep.trainer.checkpoint.manifest import CheckpointRef
from everstep.trainer.checkpoint.read import DamagedError, fill
from everstep.trainer.checkpoint.registry_weights import local_copy
from everstep.trainer.checkpoint.restore import choose
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.model_state import ModelState

PREFIX = "model."
SHOWN = 3
"""Names that a message lists; the others are counted."""


def load_weights(url: str, model: nn.Module, mesh: Mesh, match: Sequence[str] = ("*",), names: object = None) -> str:
    """Fill the model's tensors that match a pattern from a checkpoint, a run's newest, or other weights.

    Args:
        names: `init_map`, for weights that another program wrote.

    Return one line: the checkpoint, the number of weights, those left new and those not used.

    Raises:
        ConfigError: a pattern matches none of the model's weights.
        CheckpointError: no checkpoint verifies, or names and shapes differ.
    """
    tensors = {f"{PREFIX}{n}": value for n, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    wanted = _wanted(tensors, match)
    with local_copy(url, mesh) as path:
        if (foreign := _open_on_all(path, url, mesh)) is not None:
            patterns = mesh.decide(lambda: read_map(names))
            return take_foreign(url, foreign, model, mesh, wanted, renamed(foreign.tensors, patterns))
    if names is not None:
        raise ConfigError(f"init_map: init_from={url} is not of another program, so its names are the model's")
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
            f"init_from={url} has no checkpoint of Everstep, and is no safetensors or torch.save file and no folder of "
            "Hugging Face or DCP"
        )
    raise CheckpointError(f"init_from={url} has no checkpoint that can be read ({'; '.join(faults)})")


def _open_on_all(path: str, url: str, mesh: Mesh) -> ForeignWeights | None:
    """Open weights of another program on each rank, which reads them itself."""
    opened: list[ForeignWeights | None] = []
    mesh.together(lambda: opened.append(open_foreign(path)))
    found = mesh.gather(None if opened[0] is None else [opened[0].kind, len(opened[0].tensors)])
    if any(each != found[0] for each in found):
        raise CheckpointError(f"init_from={url}: not all nodes see the same files there; put them on a shared disk")
    return opened[0]


def take_foreign(
    url: str,
    foreign: ForeignWeights,
    model: nn.Module,
    mesh: Mesh,
    wanted: Mapping[str, torch.Tensor],
    old_names: Mapping[str, str],
) -> str:
    """Fill the tensors from weights of another program, cast to the model's types; return the report."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in wanted.items()}
    there = {name: foreign.tensors[old] for name, old in old_names.items()}
    mesh.together(lambda: _check_foreign(url, found, there, old_names, model))
    taken = sorted(found.keys() & there.keys())
    entries = {
        PREFIX + name: dcp.TensorStorageMetadata(dcp.TensorProperties(found[name].dtype), found[name].shape, [])
        for name in taken
    }
    state = ModelState(model)
    targets = state.allocate(dcp.Metadata(dict(entries)), {}, taken)

    def fill_all() -> None:
        for name in taken:
            try:
                value = there[name].read()
            except (ValueError, OSError, RuntimeError) as error:
                raise CheckpointError(f"init_from={url}: {old_names[name]}: {error}") from error
            put(targets[PREFIX + name], value)

    mesh.together(fill_all)
    mesh.together(lambda: state.load({}))
    cast = sum(there[name].dtype != found[name].dtype for name in taken)
    moved = sum(name != old_names[name] for name in taken)
    total = {name for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    line = f"{url} ({foreign.kind}): {len(taken)} of {len(total)} weights, {moved} renamed, {cast} cast"
    new, left = total - set(taken), there.keys() - set(taken)
    line += f"; not taken: {_some(new)}" if new else ""
    return line + (f"; left there: {_some(old_names[name] for name in left)}" if left else "")


def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into one of the model's, or into this rank's shard of it."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    mesh = target.device_mesh
    whole = value.to(target.device, target.dtype)
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    target.to_local().copy_(everywhere.redistribute(mesh, target.placements).to_local())


def _check_foreign(
    url: str,
    wanted: Mapping[str, torch.Tensor],
    there: Mapping[str, ForeignTensor],
    old_names: Mapping[str, str],
    model: nn.Module,
) -> None:
    """Raise CheckpointError for a wanted weight that is missing, or of another shape or sort of number."""
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    # A tied weight is often saved under one of its names alone.
    present = {parameters.get(name) for name in wanted if name in there} - {None}
    missing = [name for name in wanted if name not in there and parameters.get(name) not in present]
    if missing:
        unused = [old for name, old in old_names.items() if name not in wanted]
        rest = f", which has {_some(unused)} for no weight of the model" if unused else ""
        verb = "is" if len(missing) == 1 else "are"
        raise CheckpointError(
            f"init_from={url}: {_some(missing)} of the model {verb} missing there{rest}; rename by init_map, "
            "or name the weights to take with init_match"
        )
    for name in sorted(wanted.keys() & there.keys()):
        mine, other = wanted[name], there[name]
        if tuple(mine.shape) != other.shape:
            said = f"is {list(other.shape)} there, {list(mine.shape)} in the model"
        elif mine.dtype != other.dtype and not (mine.is_floating_point() and other.dtype.is_floating_point):
            said = f"is {str(other.dtype)[6:]} there, {str(mine.dtype)[6:]} in the model"
        else:
            continue
        raise CheckpointError(f"init_from={url}: {old_names[name]} {said}; name the weights to take with init_match")


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

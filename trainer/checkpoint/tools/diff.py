"""Comparison of two checkpoints, tensor by tensor, and export of the weights of one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from everstep.errors import ConfigError
from everstep.frozen_config import changes, thaw
from everstep.run_folder import CONFIG, RunFolder
from everstep.storage import join_url
from everstep.trainer.checkpoint.tensor_index import read_metadata, read_whole


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both checkpoints."""

    name: str
    what: str
    largest: float | None = None
    """The largest absolute difference of two elements."""
    cosine: float | None = None
    """Cosine of the angle between the two tensors as vectors; 1.0 is the same direction."""


def differences(first: tuple[RunFolder, str], second: tuple[RunFolder, str]) -> Iterator[Difference]:
    """Yield the tensors that differ.

    Args:
        first, second: a run folder and the path of a checkpoint in it.
    """
    sides = [(run.storage, path, read_metadata(run.storage, path)) for run, path in (first, second)]
    names = [set(metadata.state_dict_metadata) for _, _, metadata in sides]
    for name in sorted(names[0] | names[1]):
        if name not in names[0] or name not in names[1]:
            yield Difference(name, f"only in {'the second' if name in names[1] else 'the first'}")
            continue
        one, other = (read_whole(storage, path, metadata, name) for storage, path, metadata in sides)
        if one.shape != other.shape or one.dtype != other.dtype:
            yield Difference(name, f"{_kind(one)} and {_kind(other)}")
        elif not torch.equal(_bits(one), _bits(other)):
            yield _apart(name, one.double().reshape(-1), other.double().reshape(-1))


def _apart(name: str, one: Tensor, other: Tensor) -> Difference:
    apart = (one - other).abs()
    count = int((_bits(one).view(-1, 8) != _bits(other).view(-1, 8)).any(dim=1).sum())
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    return Difference(name, f"{count} of {one.numel()} elements", float(apart.max()), float(cosine))


def config_changes(first: RunFolder, second: RunFolder) -> list[str]:
    """Return the config keys with different values in two runs; none if a folder has no config."""
    try:
        one, other = (thaw(run.storage.read(CONFIG)) for run in (first, second))
    except FileNotFoundError:
        return []
    return [str(change) for change in changes(one, other)]


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes, by which NaN is equal to itself and 0.0 is not -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


WEIGHTS = {"model": "model.", "ema": "average."}
"""Prefix of the weights to export: the trained ones, or their moving average."""


def export(run: RunFolder, path: str, weights: str, to: str, only_trained: bool = False) -> int:
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
    if only_trained:
        names = _trained(names, prefix, metadata.state_dict_metadata, join_url(run.url, path))
    tensors = {n.removeprefix(prefix): read_whole(run.storage, path, metadata, n) for n in names}
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.part")
    try:
        save_file(tensors, staged, {"everstep": join_url(run.url, path), "weights": weights})
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)
    return len(tensors)


def _trained(names: list[str], prefix: str, entries: Iterable[str], url: str) -> list[str]:
    """Return the names of parameters that the optimizer has state for; others were frozen."""
    state = {entry.removeprefix("optimizer.").rpartition(".")[0] for entry in entries if entry.startswith("optimizer.")}
    found = [name for name in names if name.removeprefix(prefix) in state]
    if not found:
        raise ConfigError(f"{url}: its optimizer keeps no state for a parameter, so what was trained is not known")
    return found

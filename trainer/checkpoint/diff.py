"""How two checkpoints differ, tensor by tensor; equal means equal to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.table import read_metadata, read_whole
from trainer.run_folder import RunFolder


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both."""

    name: str
    what: str
    largest: float | None = None
    """The largest absolute difference of two elements."""


def differences(first: tuple[RunFolder, str], second: tuple[RunFolder, str]) -> Iterator[Difference]:
    """Args: first, second: a run folder and the path of a checkpoint in it."""
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
            apart = (one.double() - other.double()).abs()
            yield Difference(name, f"{int((apart != 0).sum())} of {one.numel()} elements", float(apart.max()))


def _bits(tensor: Tensor) -> Tensor:
    """NaN is equal to itself here, and 0.0 is not -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

"""Comparison of values that all ranks should hold alike: a checksum per tensor, two small reductions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from everstep.trainer.distributed.mesh import Mesh

CHUNK = 1 << 20
"""Words of 8 bytes that are summed at a time."""


def checksum(tensor: Tensor) -> Tensor:
    """Return an int64 checksum of the tensor's bytes and their order: 64-bit words times odd weights."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    rest = -len(data) % 8
    if rest or data.storage_offset() % 8:  # a part of a larger tensor may begin between two words
        data = torch.cat([data, data.new_zeros(rest)])
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        weights = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, device=tensor.device)
        total += (part * weights).sum()  # wraps around at 64 bits, as intended for a checksum
    return total


def differing(tensors: Mapping[str, Tensor], mesh: Mesh) -> list[str]:
    """Return the names of the tensors whose bytes are not the same on all ranks.

    Args:
        tensors: tensors with the same names on all ranks, in any order.
    """
    if mesh.world == 1 or not tensors:
        return []
    names = sorted(tensors)
    sums = torch.stack([checksum(tensors[name]).to(mesh.device) for name in names])
    return [name for name, same in zip(names, _equal(sums), strict=True) if not same]


def agree(values: Any, mesh: Mesh) -> bool:
    """True if a JSON value is the same on all ranks."""
    if mesh.world == 1:
        return True
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
    number = torch.tensor([int.from_bytes(digest[:8], "little", signed=True)], device=mesh.device)
    return all(_equal(number))


def _equal(numbers: Tensor) -> Sequence[bool]:
    least, most = numbers.clone(), numbers.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    equal: list[bool] = (least == most).tolist()
    return equal

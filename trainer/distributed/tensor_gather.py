"""Tensors of all ranks, of any number, shape and type, on rank 0, over the CPU part of their group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from everstep.trainer.distributed import json_collectives
from everstep.trainer.distributed.mesh import Mesh

Placed = tuple[tuple[int, ...], Tensor]
"""A tensor, and its place in the order of all."""


def gather_tensors(own: Sequence[Placed], mesh: Mesh) -> list[Placed]:
    """Return the tensors of all ranks, on the CPU of rank 0; nothing on the others."""
    if mesh.world == 1:
        return list(own)
    held = [(place, tensor.detach().cpu().contiguous()) for place, tensor in own]
    heads = [[list(place), list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for place, tensor in held]
    data = [tensor.reshape(-1).view(torch.uint8) for _, tensor in held]
    whole = torch.cat([torch.empty(0, dtype=torch.uint8), *data])
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.world)]
    dist.all_gather(lengths, torch.tensor([len(whole)]))
    longest = max(int(length) for length in lengths)
    every = json_collectives.gather_on_main(heads, mesh.rank, mesh.world)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(mesh.world)] if mesh.is_main else None
    dist.gather(torch.cat([whole, whole.new_zeros(longest - len(whole))]), parts, dst=0)
    return [found for heads, part in zip(every, parts or [], strict=True) for found in _split(heads, part)]


def _split(heads: Sequence[tuple[list[int], list[int], str]], data: Tensor) -> list[Placed]:
    found, at = [], 0
    for place, shape, name in heads:
        dtype: torch.dtype = getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append((tuple(place), data[at : at + size].clone().view(dtype).reshape(shape)))
        at += size
    return found

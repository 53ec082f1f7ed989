"""Buffers that forward passes change (running statistics, codebooks, queues), kept equal on all ranks.

DDP and FSDP leave buffers to each rank, where each sees its own microbatches. A checkpoint holds one copy, so ranks
that differ could not be resumed. After each step the ranks therefore take over rank 0's values, or the mean of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.agreement import differing
from trainer.config import Buffers
from trainer.errors import ConfigError
from trainer.mesh import Mesh
from trainer.model_state import write


class BufferSync:
    """Finds the buffers that change, in the first step of a start and at each save, and makes them equal."""

    def __init__(self, model: nn.Module, mesh: Mesh, policy: Buffers) -> None:
        self.model = model
        self.mesh = mesh
        self.policy = policy
        self.changing: list[str] = []
        """Names of the buffers that change, the same on all ranks; part of a checkpoint."""
        self._observed = False

    def copies(self) -> dict[str, Tensor]:
        """Copies of the buffers that a step may change: of all of them before the first step of a start."""
        if self._observed and not self.changing:
            return {}
        return {
            name: buffer.detach().clone()
            for name, buffer in self.model.named_buffers()
            if not self._observed or name in self.changing
        }

    def after_step(self, before: dict[str, Tensor], skipped: Tensor | bool) -> None:
        """Undo what a bad step did to the buffers, else make those that it changed equal on all ranks.

        Args:
            before: what `copies` gave before the step.
            skipped: True for a step that is to change nothing; a tensor on a GPU, so that the host does not wait.
        """
        if not self._observed:
            self._observe(before)
        if not self.changing:
            return
        self.sync()
        if skipped is False:
            return
        for name, buffer in self.model.named_buffers():
            if name in before and name in self.changing and before[name].shape == buffer.shape:
                old = before[name]
                write(buffer.detach(), old if skipped is True else torch.where(skipped > 0, old, buffer.detach()))

    def make_equal(self) -> None:
        """Give all ranks rank 0's buffers, as a new model's may be made of what differs between processes."""
        kept, self.changing = self.changing, [name for name, _ in self.model.named_buffers()]
        self.sync()
        self.changing = kept

    def sync(self) -> None:
        """Make the buffers that change equal on all ranks, all of one type in one message."""
        if self.mesh.world == 1 or self.policy is Buffers.local:
            return
        named = dict(self.model.named_buffers())
        for group in _by_dtype(named[name].detach() for name in self.changing if name in named):
            flat = torch.cat([buffer.reshape(-1) for buffer in group])
            if self.policy is Buffers.mean and (flat.is_floating_point() or flat.is_complex()):
                dist.all_reduce(flat)
                flat /= self.mesh.world
            else:
                dist.broadcast(flat, src=0)
            for buffer, part in zip(group, torch.split(flat, [buffer.numel() for buffer in group]), strict=True):
                write(buffer, part.view(buffer.shape))

    def before_save(self) -> None:
        """Make equal what has come to differ since the last save, so that a checkpoint holds what all ranks have."""
        if self.mesh.world == 1 or self.policy is Buffers.local:
            return
        found = differing(dict(self.model.named_buffers()), self.mesh)
        if not found:
            return
        shapes: list[dict[str, Any]] = self.mesh.gather({n: tuple(b.shape) for n, b in self.model.named_buffers()})
        for name in found:
            if any(other[name] != shapes[0][name] for other in shapes):
                sizes = ", ".join(str(shape[name]) for shape in shapes)
                raise ConfigError(
                    f"the model's buffer {name} has another shape on each rank ({sizes}); a checkpoint holds one: "
                    "give it a fixed size, or train with parallel=single"
                )
        self._add(found)
        self.sync()

    def _observe(self, before: dict[str, Tensor]) -> None:
        self._observed = True
        changed = [n for n, b in self.model.named_buffers() if n not in before or not torch.equal(before[n], b)]
        self._add(name for names in self.mesh.gather(changed) for name in names)

    def _add(self, names: Iterable[str]) -> None:
        self.changing = sorted({*self.changing, *names})


def _by_dtype(buffers: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        groups.setdefault(buffer.dtype, []).append(buffer)
    return list(groups.values())

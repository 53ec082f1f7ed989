"""Buffers that forward passes change (running statistics, codebooks, queues), kept equal on all ranks.

Under DDP and FSDP each rank changes its buffers by its own microbatches. A checkpoint holds one copy, so a run whose
ranks differ could not be resumed. After each step the ranks therefore take rank 0's values, or the mean of all.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everstep.config import Buffers
from everstep.errors import ConfigError
from everstep.trainer.distributed.agreement import agree, differing
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.optim import by_dtype
from everstep.trainer.state.model_state import write


class BufferSync:
    """Finds the buffers that change, in an attempt's first step and at each save, and makes them equal."""

    def __init__(self, model: nn.Module, mesh: Mesh, policy: Buffers) -> None:
        self.model = model
        self.mesh = mesh
        self.policy = policy
        self.changing: list[str] = []
        """Names of the buffers that change, the same on all ranks; part of a checkpoint."""
        self._observed = False

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the buffers that a step may change; of all buffers before an attempt's first step."""
        if self._observed and not self.changing:
            return {}
        return {
            name: buffer.detach().clone()
            for name, buffer in self.model.named_buffers()
            if not self._observed or name in self.changing
        }

    def after_step(self, before: dict[str, Tensor], skipped: Tensor | bool) -> None:
        """Make the buffers that change equal on all ranks; after a skipped step, restore their values.

        Args:
            before: result of `copies` before the step.
            skipped: True for a step that must change nothing; a tensor on a GPU, so that the host does not wait.
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
        """Make all buffers equal on all ranks, since a new model's may depend on the process that built it."""
        kept, self.changing = self.changing, [name for name, _ in self.model.named_buffers()]
        self.sync()
        self.changing = kept

    def sync(self) -> None:
        """Make the buffers that change equal on all ranks, all of one type in one message."""
        if self.mesh.world == 1 or self.policy is Buffers.local:
            return
        named = dict(self.model.named_buffers())
        for group in by_dtype([named[name].detach() for name in self.changing if name in named]):
            flat = torch.cat([buffer.reshape(-1) for buffer in group])
            if self.policy is Buffers.mean and (flat.is_floating_point() or flat.is_complex()):
                dist.all_reduce(flat)
                flat /= self.mesh.world
            else:
                dist.broadcast(flat, src=0)
            for buffer, part in zip(group, torch.split(flat, [buffer.numel() for buffer in group]), strict=True):
                write(buffer, part.view(buffer.shape))

    def before_save(self) -> None:
        """Make buffers that differ between ranks equal, so that a checkpoint is valid for all ranks."""
        if self.mesh.world == 1 or self.policy is Buffers.local:
            return
        self._check_shapes()
        if found := differing(dict(self.model.named_buffers()), self.mesh):
            self._add(found)
            self.sync()

    def is_even(self) -> bool:
        """True if a checkpoint is valid for all ranks as the buffers are."""
        if self.mesh.world == 1 or self.policy is Buffers.local:
            return True
        buffers = dict(self.model.named_buffers())
        mine = {name: f"{list(buffer.shape)} of {buffer.dtype}" for name, buffer in buffers.items()}
        return agree(mine, self.mesh) and not differing(buffers, self.mesh)

    def _observe(self, before: dict[str, Tensor]) -> None:
        """Record, on all ranks, the buffers that an attempt's first step has changed on one of them."""
        self._observed = True
        changed = [n for n, b in self.model.named_buffers() if n not in before or not torch.equal(before[n], b)]
        self._add(name for names in self.mesh.gather(changed) for name in names)
        if self.policy is not Buffers.local:
            self._check_shapes()

    def _check_shapes(self) -> None:
        """Raise ConfigError on all ranks if a buffer is missing, or has another shape or type, on one of them.

        A collective over tensors of different sizes fails in gloo, as if a rank were lost, or mixes their values.
        """
        mine = {name: f"{list(buffer.shape)} of {buffer.dtype}" for name, buffer in self.model.named_buffers()}
        if agree(mine, self.mesh):
            return
        found = self.mesh.gather(mine)
        name = next(name for other in found for name in other if any(one.get(name) != other[name] for one in found))
        shapes = ", ".join(dict.fromkeys(one.get(name, "none") for one in found))
        raise ConfigError(
            f"the model's buffer {name} is not of one shape and type on all ranks ({shapes}); a checkpoint holds one: "
            "give it a fixed shape, or train with parallel=single"
        )

    def _add(self, names: Iterable[str]) -> None:
        self.changing = sorted({*self.changing, *names})

"""Buffers that forward passes change (running statistics, codebooks, queues), kept equal on all ranks.

Under DDP and FSDP each rank changes its buffers by its own microbatches. A checkpoint holds one copy, so a run whose
ranks differ could not be resumed, and one that is resumed on another number of ranks would train otherwise.
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
from everstep.trainer.state.step_buffers import Place, StepBuffers, places_of


class BufferSync:
    """Finds the buffers that change, in a run's first step and at each save, and makes them equal."""

    def __init__(self, model: nn.Module, mesh: Mesh, policy: Buffers) -> None:
        self.model = model
        self.mesh = mesh
        self.policy = policy
        self.changing: list[str] = []
        """Names of the buffers that change, the same on all ranks; part of a checkpoint."""
        self._places: list[Place] | None = None
        """Places of the buffers that change; None if they are not known yet."""

    def begin_step(self, watch: bool) -> StepBuffers | None:
        """Keep the values at the start of a step; None if no buffer changes. `watch` finds those that do."""
        if not watch and not self.changing:
            return None
        return StepBuffers(places_of(self.model) if watch else self._tracked(), self.policy, watch)

    def end_step(self, step: StepBuffers, skipped: Tensor | bool) -> None:
        """Make the buffers that change equal on all ranks; after a skipped step, restore their values.

        Args:
            step: result of `begin_step`.
            skipped: True for a step that must change nothing; a tensor on a GPU, so that the host does not wait.
        """
        if step.watch:
            self._observe(step.changed)
        if not self.changing:
            return
        if self.policy is not Buffers.local:
            step.settle(self.changing, self.mesh)
        if skipped is not False:
            step.undo(self.changing, skipped)

    def _tracked(self) -> list[Place]:
        if self._places is None:
            self._places = [place for place in places_of(self.model) if place.name in self.changing]
        return self._places

    def make_equal(self) -> None:
        """Make all buffers equal on all ranks, since a new model's may depend on the process that built it."""
        self._take_rank_0(name for name, _ in self.model.named_buffers())

    def _take_rank_0(self, names: Iterable[str]) -> None:
        """Give all ranks the buffers of rank 0, all of one type in one message."""
        if self.mesh.world == 1 or self.policy is Buffers.local:
            return
        named = dict(self.model.named_buffers())
        for group in by_dtype([named[name].detach() for name in names if name in named]):
            flat = torch.cat([buffer.reshape(-1) for buffer in group])
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
            self._take_rank_0(self.changing)

    def is_even(self) -> bool:
        """True if a checkpoint is valid for all ranks as the buffers are."""
        if self.mesh.world == 1 or self.policy is Buffers.local:
            return True
        buffers = dict(self.model.named_buffers())
        mine = {name: f"{list(buffer.shape)} of {buffer.dtype}" for name, buffer in buffers.items()}
        return agree(mine, self.mesh) and not differing(buffers, self.mesh)

    def _observe(self, changed: Iterable[str]) -> None:
        """Record, on all ranks, the buffers that a run's first step has changed on one of them."""
        self._add(name for names in self.mesh.gather(sorted(changed)) for name in names)
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

    def restore(self, names: Iterable[str]) -> None:
        """Add the buffers that a checkpoint says to change."""
        self._add(names)

    def _add(self, names: Iterable[str]) -> None:
        self.changing = sorted({*self.changing, *names})
        self._places = None

"""Buffers during one step, independent of the number of processes.

Each pass starts from the values at the start of the step, so it does not matter which passes a process took before. The
step ends with the values that the pass of the first microbatch left, or with the mean over all microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from everstep.config import Buffers
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.model_state import write


class Place(NamedTuple):
    """A buffer's name, and the dict of its module that holds it."""

    name: str
    holder: dict[str, Any]
    key: str
    of_norm: bool
    """True in a layer of BatchNorm or InstanceNorm."""

    @property
    def tensor(self) -> Tensor | None:
        found: Tensor | None = self.holder.get(self.key)
        return found


def places_of(model: nn.Module) -> list[Place]:
    """Return the places of all buffers, also of those that are None as yet."""
    return [
        Place(f"{path}.{key}" if path else key, module._buffers, key, isinstance(module, _NormBase))
        for path, module in model.named_modules()
        for key in module._buffers
    ]


def is_averaged(place: Place, policy: Buffers) -> bool:
    """True if a step ends with the mean of this buffer, False if with the first microbatch's values."""
    tensor = place.tensor
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return policy is Buffers.mean or (policy is Buffers.auto and place.of_norm)


class StepBuffers:
    """Values of some buffers during one step of one rank.

    Args:
        watch: True to find out which buffers the passes change.
    """

    def __init__(self, places: Sequence[Place], policy: Buffers, watch: bool) -> None:
        self.places = places
        self.policy = policy
        self.watch = watch
        self.changed: set[str] = set()
        self._start = {place.name: _clone(place.tensor) for place in places}
        self._first: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._real = 0

    def after_pass(self, index: int, real: bool) -> None:
        """Take the values that the forward pass of a microbatch, by its number, has left."""
        if self.watch:
            self.changed |= {place.name for place in self.places if self._differs(place)}
        if not real or self.policy is Buffers.local:
            return
        self._real += 1
        for place in self.places:
            if (tensor := place.tensor) is None:
                continue
            if is_averaged(place, self.policy):
                self._add(place.name, tensor.detach())
            elif index == 0:  # a copy, since activation checkpointing runs the pass again in backward
                self._first[place.name] = tensor.detach().clone()

    def _add(self, name: str, value: Tensor) -> None:
        if (total := self._sums.get(name)) is None or total.shape != value.shape:
            self._sums[name] = value.clone()
        else:
            total += value

    def rewind(self) -> None:
        """Set the values at the start of the step, in the tensors that the model has now."""
        for place in self.places:
            start, now = self._start[place.name], place.tensor
            if start is None or now is None or now.shape != start.shape:
                place.holder[place.key] = _clone(start)
            else:
                write(now.detach(), start)

    def settle(self, names: Sequence[str], mesh: Mesh) -> None:
        """Set the values that the step ends with, the same on all ranks.

        Args:
            names: the buffers that change, the same on all ranks.
        """
        wanted = set(names)
        found = [place for place in self.places if place.name in wanted and place.tensor is not None]
        mean = [place for place in found if is_averaged(place, self.policy)]
        for group in _by_dtype(mean):
            self._set_mean(group, mesh)
        for group in _by_dtype([place for place in found if place not in mean]):
            self._set_first(group, mesh)

    def _set_mean(self, group: Sequence[Place], mesh: Mesh) -> None:
        values = [self._sums.get(place.name, torch.zeros_like(_of(place))).reshape(-1) for place in group]
        flat = torch.cat([*values, values[0].new_full((1,), self._real)])
        if mesh.world > 1:
            dist.all_reduce(flat)
        _set(group, flat[:-1] / flat[-1])

    def _set_first(self, group: Sequence[Place], mesh: Mesh) -> None:
        flat = torch.cat([self._first.get(place.name, _of(place)).reshape(-1) for place in group])
        if mesh.world > 1:
            dist.broadcast(flat, src=0)  # rank 0 passes the first microbatch of each step
        _set(group, flat)

    def undo(self, names: Sequence[str], skipped: Tensor | bool) -> None:
        """Set the values at the start of the step if it is skipped: True, or a tensor that is 1 on a GPU."""
        wanted = set(names)
        for place in self.places:
            start, now = self._start[place.name], place.tensor
            if place.name in wanted and start is not None and now is not None and start.shape == now.shape:
                write(
                    now.detach(),
                    torch.where(skipped > 0, start, now.detach()) if isinstance(skipped, Tensor) else start,
                )

    def _differs(self, place: Place) -> bool:
        start, now = self._start[place.name], place.tensor
        if start is None or now is None:
            return start is not now
        return start.shape != now.shape or not torch.equal(start, now)


def _clone(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


def _of(place: Place) -> Tensor:
    assert place.tensor is not None  # `settle` has left out the others
    return place.tensor.detach()


def _by_dtype(places: Sequence[Place]) -> list[list[Place]]:
    groups: dict[torch.dtype, list[Place]] = {}
    for place in places:
        groups.setdefault(_of(place).dtype, []).append(place)
    return list(groups.values())


def _set(group: Sequence[Place], flat: Tensor) -> None:
    sizes = [_of(place).numel() for place in group]
    for place, part in zip(group, torch.split(flat, sizes), strict=True):
        write(_of(place), part.view(_of(place).shape))

"""The state of a user's optimizer: per parameter, in its groups, and beside both.

Optimizers keep state in many places: a list of tensors for a parameter (Shampoo), counters in `param_groups` (Prodigy,
schedule-free), entries of their own in `state_dict()`. Values of a group are saved if they have changed since the
optimizer was built, so that a hyperparameter that the user changes on a resume is not overwritten by an old one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from everstep.errors import CheckpointError
from everstep.trainer.state.model_state import empty
from everstep.trainer.state.state_tree import KIND, pack, tensor_entries, unpack

PREFIX = "optimizer."
SCHEDULED = ("params", "lr", "peak_lr")
"""Entries of a group that follow from the config and the step."""


class OptimizerState:
    """Packs an optimizer's state for a checkpoint and loads a checkpoint's into the optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self._first = [
            {key: _copy(value) for key, value in group.items() if key not in SCHEDULED}
            for group in optimizer.param_groups
        ]
        self._targets: dict[str, Tensor] = {}

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Add all tensors to `tensors` as `optimizer.PARAMETER.KEY`; return the rest as JSON."""
        named = dict(self.model.named_parameters())
        parameters = {name: self._pack_parameter(name, parameter, tensors) for name, parameter in named.items()}
        parameters = {name: rest for name, rest in parameters.items() if rest}
        groups = [pack(group, f"{PREFIX}groups.{number}", tensors) for number, group in enumerate(self._changed())]
        values = {
            "parameters": parameters,
            "groups": groups if any(groups) else [],
            "shared": self._pack_shared(named, tensors),
            "own": self._pack_own(tensors),
        }
        return {key: value for key, value in values.items() if value}

    def allocate(self, metadata: dcp.Metadata, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Empty the optimizer's state, and return the tensors to be filled from a checkpoint, by name."""
        self.optimizer.state.clear()
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        named = dict(self.model.named_parameters())
        nested = {entry["tensor"]: entry for entry in tensor_entries(dict(values))}
        self._targets = {}
        for full, entry in metadata.state_dict_metadata.items():
            if not full.startswith(PREFIX) or not isinstance(entry, dcp.TensorStorageMetadata):
                continue
            name, key = _split(full, named)
            parameter = named.get(name)
            if full in nested:
                self._targets[full] = _room_for(nested[full], entry, parameter, self._device())
            elif parameter is not None and id(parameter) in groups:
                room = _room(entry, parameter, groups[id(parameter)])
                self.optimizer.state[parameter][key] = self._targets[full] = room
        return self._targets

    def load(self, values: Mapping[str, Any]) -> None:
        """Set the filled tensors, and the values that are no tensors, in the optimizer."""
        named = dict(self.model.named_parameters())
        for name, rest in values.get("parameters", {}).items():
            if name in named:
                self.optimizer.state[named[name]].update(unpack(rest, self._targets))
        changed = values.get("groups", [])
        if changed and len(changed) != len(self.optimizer.param_groups):
            raise CheckpointError(
                f"the checkpoint has {len(changed)} groups of optimizer parameters, "
                f"the optimizer has {len(self.optimizer.param_groups)}"
            )
        for number, (group, first) in enumerate(zip(self.optimizer.param_groups, self._first, strict=True)):
            for key in [key for key in group if key not in SCHEDULED and key not in first]:
                del group[key]
            group.update({key: _copy(value) for key, value in first.items()})
            group.update(unpack(changed[number], self._targets) if changed else {})
        for key, value in unpack(values.get("shared", {}), self._targets).items():
            self.optimizer.state[key] = value
        if own := values.get("own"):
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), **unpack(own, self._targets)})
        self._targets = {}

    def _pack_parameter(self, name: str, parameter: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Add the tensors of one parameter's state to `tensors`; return as JSON what `_room` cannot restore."""
        state = self.optimizer.state.get(parameter, {})
        packed = pack(dict(state), f"{PREFIX}{name}", tensors)
        if KIND in packed:  # some keys are not text
            return dict(packed)
        ordinary = [key for key, value in state.items() if isinstance(value, Tensor) and _is_ordinary(value, parameter)]
        return {key: value for key, value in packed.items() if key not in ordinary}

    def _changed(self) -> list[dict[str, Any]]:
        """Return the entries of each group that have changed since the optimizer was built.

        Raises:
            CheckpointError: a group was added or removed: a new optimizer would not have the same ones.
        """
        groups = len(self.optimizer.param_groups)
        if groups != len(self._first):
            raise CheckpointError(
                f"the optimizer has another number of groups than when it was made ({groups}, not {len(self._first)}), "
                "and a resume makes it as it was then: make all groups in its constructor"
            )
        return [
            {
                key: value
                for key, value in group.items()
                if key not in SCHEDULED and (key not in first or not _same(value, first[key]))
            }
            for group, first in zip(self.optimizer.param_groups, self._first, strict=True)
        ]

    def _pack_shared(self, named: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> Any:
        """Pack the state that belongs to no parameter of the model."""
        known = set(map(id, named.values()))
        shared = {key: value for key, value in self.optimizer.state.items() if id(key) not in known}
        strange = next((key for key in shared if not isinstance(key, str | int)), None)
        if isinstance(strange, Tensor):
            raise CheckpointError(
                f"the optimizer keeps state for a tensor {list(strange.shape)} that is no parameter of the model"
            )
        return pack(shared, f"{PREFIX}shared", tensors) if shared else {}

    def _pack_own(self, tensors: dict[str, Tensor]) -> Any:
        """Pack the entries of an optimizer's own `state_dict()` other than `state` and `param_groups`."""
        if type(self.optimizer).state_dict is torch.optim.Optimizer.state_dict:
            return {}
        own = {k: v for k, v in self.optimizer.state_dict().items() if k not in ("state", "param_groups")}
        return pack(own, f"{PREFIX}own", tensors) if own else {}

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))


def _split(full: str, named: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return (parameter, key) of `optimizer.PARAMETER.KEY`.

    Both may contain dots, so the longest name of a parameter is used.
    """
    parts = full.removeprefix(PREFIX).split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:cut])) in named:
            return name, ".".join(parts[cut:])
    return "", full


def _is_ordinary(value: Tensor, parameter: Tensor) -> bool:
    """True if `_room` makes such a tensor again from its shape alone."""
    if value.shape == parameter.shape and parameter.dim() > 0:
        return isinstance(value, DTensor) == isinstance(parameter, DTensor) and value.device == parameter.device
    return value.dim() == 0 and not isinstance(value, DTensor)


def _room(entry: dcp.TensorStorageMetadata, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return an empty tensor for one piece of state: like its parameter, or small and whole on every rank."""
    if entry.size == parameter.shape and parameter.dim() > 0:
        return torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
    on_device = group.get("fused") or group.get("capturable") or entry.size != torch.Size([])
    return empty(entry, parameter.device if on_device else torch.device("cpu"))


def _room_for(
    saved: Mapping[str, Any], entry: dcp.TensorStorageMetadata, parameter: Tensor | None, device: torch.device
) -> Tensor:
    """Return an empty tensor for state of a shape of its own, sharded as before if the parameter is."""
    dtype = entry.properties.dtype
    if not isinstance(parameter, DTensor) or "shard_dim" not in saved:
        return empty(entry, torch.device("cpu") if saved.get("on_host") else device)
    dim, mesh = saved["shard_dim"], parameter.device_mesh
    last: Placement = Replicate() if dim is None else Shard(dim)
    placements = [*([Replicate()] * (mesh.ndim - 1)), last]
    return torch.distributed.tensor.empty(entry.size, dtype=dtype, device_mesh=mesh, placements=placements)


def _copy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # an object that cannot be copied counts as unchanged as long as it is the same object
        return value


def _same(value: Any, first: Any) -> bool:
    if value is first:
        return True
    if isinstance(value, Tensor) or isinstance(first, Tensor):
        return isinstance(value, Tensor) and isinstance(first, Tensor) and torch.equal(value, first)
    if type(value) is not type(first):
        return False
    if isinstance(value, dict):
        return value.keys() == first.keys() and all(_same(value[key], first[key]) for key in value)
    if isinstance(value, list | tuple):
        return len(value) == len(first) and all(map(_same, value, first))
    return bool(value == first)

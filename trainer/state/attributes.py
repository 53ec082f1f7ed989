"""State in plain attributes of objects, outside any `state_dict()`: counters, flags, running values.

`self.calls += 1` in a forward pass, a temperature that is multiplied at each step, a buffer with `persistent=False`: a
`state_dict()` lacks them all. Attributes that were numbers, flags, text, small containers, arrays or tensors when the
object was built, and have changed since, are saved under their own names and set again on a resume.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp

from everstep.errors import CheckpointError
from everstep.trainer.distributed.agreement import checksum
from everstep.trainer.state.model_state import nested_targets, write
from everstep.trainer.state.state_tree import is_number, pack, unpack

PREFIX = "attributes."
HOOKS = "hooks."
LONGEST = 64
"""Elements of a container that is searched.

A container that is longer from the start is a table, which does not change.
"""
KEPT_BYTES = 2**24
"""Size of a first value that is kept, for a rollback to a checkpoint from before its first change."""
STRUCTURE = frozenset(vars(nn.Module())) - {"training"}
"""Attributes in which a module keeps its parameters, buffers, modules and hooks."""
NOT_STATE = frozenset(vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))) | {"found_inf", "grad_scale"}
"""Attributes that each optimizer has; `OptimizerState` saves those of them that are state."""
_SCALARS = (type(None), bool, int, float, complex, str)
_SEQUENCES = (list, tuple, deque, set, frozenset)
_MAPPINGS = (dict, OrderedDict)


class Attributes:
    """Plain attributes of some objects, by path: their first values, and those that have changed since."""

    def __init__(self, objects: Mapping[str, object]) -> None:
        self.objects = dict(objects)
        found = [(name, holder[key]) for name, holder, key in self.entries() if is_plain(holder[key])]
        self._first = {name: mark(value) for name, value in found}
        self._values = {name: copy.deepcopy(value) for name, value in found if _bytes(value) <= KEPT_BYTES}
        """First values, which are set again if a checkpoint does not hold an attribute."""

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the changed attributes as JSON; their tensors are added to `tensors`."""
        changed: dict[str, Any] = {}
        for name, holder, key in self.entries():
            first, value = self._first.get(name), holder[key]
            if _is_state(value, first) and mark(value) != first:
                changed[name] = pack(value, PREFIX + name, tensors)
        return changed

    def is_state(self, name: str) -> bool:
        """True for an attribute that a checkpoint holds once it has changed."""
        holder, key = self.holder(name)
        return _is_state(holder.get(key), self._first.get(name))

    def allocate(self, metadata: dcp.Metadata, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors to be filled from a checkpoint, by name."""
        modules = (thing for thing in self.objects.values() if isinstance(thing, nn.Module))
        device = next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))
        return nested_targets(metadata, values, device)

    def load(self, values: Mapping[str, Any], filled: Mapping[str, Tensor]) -> None:
        """Set the attributes that a checkpoint holds, and all others to their first values.

        Raises:
            CheckpointError: a name is no plain attribute of the objects. A hook may have been left out since.
        """
        saved = {
            name: unpack(packed, filled)
            for name, packed in values.items()
            if not name.startswith(HOOKS) or self._path(name) is not None
        }
        for name in saved:
            self._check_settable(name)
        anew = {name: value for name, value in self._values.items() if name not in saved}
        for name, value in {**copy.deepcopy(anew), **saved}.items():
            holder, key = self.holder(name)
            now = holder.get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
                write(now.detach(), value)
            else:
                holder[key] = value

    def _check_settable(self, name: str) -> None:
        """Refuse to overwrite an attribute that is not plain, since a manifest may be from another user."""
        owner, key = self._owner(name)
        now = self.holder(name)[0].get(key, getattr(type(owner), key, None))
        if key in STRUCTURE or not (name in self._first or is_plain(now)):
            raise CheckpointError(f"the checkpoint has a value for {name}, which is no plain attribute here")

    def holder(self, name: str) -> tuple[dict[str, Any], str]:
        """Return the dict that holds an attribute, or is to hold it, and its key there."""
        owner, key = self._owner(name)
        if isinstance(owner, nn.Module) and key in owner._buffers:
            return owner._buffers, key
        return vars(owner), key

    def _owner(self, name: str) -> tuple[object, str]:
        """Return the object whose attribute `name` is, and the attribute's own name."""
        path = self._path(name)
        if path is not None:
            thing, inner = self.objects[path], name.removeprefix(f"{path}.")
            if not isinstance(thing, nn.Module):
                return thing, inner
            where, _, key = inner.rpartition(".")
            with contextlib.suppress(AttributeError):
                return thing.get_submodule(where), key
        raise CheckpointError(f"the checkpoint has a value for {name}, which is not there any more")

    def _path(self, name: str) -> str | None:
        """Return the path of the object that an attribute belongs to; None if there is no such object."""
        return max((path for path in self.objects if name.startswith(f"{path}.")), key=len, default=None)

    def entries(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield (path, the dict that holds the attribute, its key there) of each attribute that may be state."""
        for path, thing in self.objects.items():
            if not isinstance(thing, nn.Module):
                left_out = NOT_STATE if isinstance(thing, torch.optim.Optimizer) else frozenset()
                yield from ((f"{path}.{k}", vars(thing), k) for k in _keys(thing) if k not in left_out)
                continue
            for inner, module in thing.named_modules():
                where = f"{path}.{inner}" if inner else path
                yield from ((f"{where}.{k}", vars(module), k) for k in _keys(module) if k not in STRUCTURE)
                for leaf in module._non_persistent_buffers_set:
                    if module._buffers.get(leaf) is not None:
                        yield f"{where}.{leaf}", module._buffers, leaf


def _keys(thing: object) -> list[str]:
    return list(vars(thing)) if hasattr(thing, "__dict__") else []


def is_plain(value: Any) -> bool:
    """True for a value that may be state: numbers, text, tensors, arrays and small containers of them."""
    if type(value) in _SCALARS:
        return True
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Buffer) and value.layout is torch.strided and not value.is_meta
        return plain and not value.requires_grad
    if type(value) is np.ndarray or isinstance(value, np.generic):
        return is_number(value.dtype)
    if type(value) in _MAPPINGS:
        return len(value) <= LONGEST and all(type(k) in (str, int) and is_plain(v) for k, v in value.items())
    return type(value) in _SEQUENCES and len(value) <= LONGEST and all(map(is_plain, value))


def _is_state(value: Any, first: Any) -> bool:
    """True if a value must be saved, by the mark of the attribute's first value.

    A tensor or array is state if one of its shape and type was there at first; others are results of a pass. A
    container that was short at first is state at any length, if it holds only numbers and text.
    """
    if isinstance(value, Tensor | np.ndarray):
        return is_plain(value) and first is not None and first[:3] == _kind(value)
    return is_plain(value) or (first is not None and _is_flat(value))


def _is_flat(value: Any) -> bool:
    if type(value) in _MAPPINGS:
        return all(type(key) in (str, int) for key in value) and _is_flat(list(value.values()))
    return type(value) in _SEQUENCES and all(type(item) in _SCALARS for item in value)


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor | np.ndarray) else 0


def _kind(value: Tensor | np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return (type(value).__name__, tuple(value.shape), value.dtype)


def _as_tensor(value: np.ndarray[Any, Any]) -> Tensor:
    """Return the bytes of an array as a tensor, without a copy if they are writable and contiguous."""
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return torch.from_numpy(data if data.flags.writeable else data.copy())


def mark(value: Any) -> Any:
    """Return a value that is equal as long as the attribute is unchanged, and holds none of its memory."""
    if isinstance(value, Tensor):
        return (*_kind(value), int(checksum(value)))
    if isinstance(value, np.ndarray):
        return (*_kind(value), int(checksum(_as_tensor(value))))
    if isinstance(value, dict):
        return (type(value).__name__, tuple((key, mark(item)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return (type(value).__name__, frozenset(map(mark, value)))
    if isinstance(value, list | tuple | deque):
        return (type(value).__name__, tuple(map(mark, value)))
    return (type(value).__name__, repr(value))

"""State that objects keep in plain attributes, outside of any `state_dict()`: counters, flags, running values.

`self.calls += 1` in a forward pass, a temperature that is multiplied at each step, a buffer with `persistent=False`: a
`state_dict()` lacks them all. Attributes that were numbers, flags, text, small containers or tensors when the object
was built, and have changed since, are saved under their own names and set again on a resume.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp

from trainer.agreement import checksum
from trainer.errors import CheckpointError
from trainer.model_state import empty, write
from trainer.state_tree import pack, tensor_entries, unpack

PREFIX = "attributes."
LONGEST = 64
"""Elements of a container that is looked into; longer ones are tables, which do not change."""
KEPT_BYTES = 2**24
STRUCTURE = frozenset(vars(nn.Module())) - {"training"}
NOT_STATE = frozenset(vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))) | {"found_inf", "grad_scale"}


class Attributes:
    """The plain attributes of some objects, by their path, as they were when this was made and as they are now."""

    def __init__(self, objects: Mapping[str, object]) -> None:
        self.objects = dict(objects)
        found = [(name, holder[key]) for name, holder, key in self._all() if is_plain(holder[key])]
        self._first = {name: _mark(value) for name, value in found}
        self._values = {name: copy.deepcopy(value) for name, value in found if _bytes(value) <= KEPT_BYTES}
        """To go back to, where a checkpoint says nothing of an attribute."""

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return those that have changed as JSON; their tensors are added to `tensors`."""
        changed: dict[str, Any] = {}
        for name, holder, key in self._all():
            first, value = self._first.get(name), holder[key]
            if not is_plain(value) or (isinstance(value, Tensor) and not _alike(value, first)):
                continue
            if _mark(value) != first:
                changed[name] = pack(value, PREFIX + name, tensors)
        return changed

    def allocate(self, metadata: dcp.Metadata, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors to be filled from a checkpoint, by name."""
        entries = metadata.state_dict_metadata
        targets = {}
        for packed in tensor_entries(dict(values)):
            entry = entries.get(packed["tensor"])
            if not isinstance(entry, dcp.TensorStorageMetadata):
                raise CheckpointError(f"the checkpoint has no tensor {packed['tensor']}")
            targets[packed["tensor"]] = empty(entry, torch.device("cpu"))
        return targets

    def load(self, values: Mapping[str, Any], filled: Mapping[str, Tensor]) -> None:
        saved = {name: unpack(packed, filled) for name, packed in values.items()}
        for name in saved:
            self._check_settable(name)
        anew = {name: value for name, value in self._values.items() if name not in saved}
        for name, value in {**copy.deepcopy(anew), **saved}.items():
            holder, key = self._holder(name)
            now = holder.get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
                write(now.detach(), value)
            else:
                holder[key] = value

    def _check_settable(self, name: str) -> None:
        """Refuse to overwrite what is no plain value here: a manifest may come from elsewhere."""
        holder, key = self._holder(name)
        thing = next(self.objects[path] for path in self.objects if name.startswith(f"{path}."))
        owner = thing.get_submodule(".".join(name.split(".")[1:-1])) if isinstance(thing, nn.Module) else thing
        now = holder.get(key, getattr(type(owner), key, None))
        if key in STRUCTURE or not is_plain(now):
            raise CheckpointError(f"the checkpoint has a value for {name}, which is no plain attribute here")

    def _holder(self, name: str) -> tuple[dict[str, Any], str]:
        """The dict that holds an attribute, or is to hold it, and its key there."""
        for path, thing in self.objects.items():
            inner = name.removeprefix(f"{path}.")
            if inner == name:
                continue
            if not isinstance(thing, nn.Module):
                return vars(thing), inner
            where, _, key = inner.rpartition(".")
            try:
                module = thing.get_submodule(where)
            except AttributeError:
                break
            return (module._buffers if key in module._buffers else vars(module)), key
        raise CheckpointError(f"the checkpoint has a value for {name}, which is not there any more")

    def _all(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """(path, the dict that holds the attribute, its key there) of each attribute that may be state."""
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
    """True for a value that may be state: no table, no graph, no object."""
    if value is None or type(value) in (bool, int, float, str):
        return True
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, nn.Buffer) and value.layout is torch.strided and not value.is_meta
        return plain and not value.requires_grad
    if type(value) is dict:
        return len(value) <= LONGEST and all(type(k) in (str, int) and is_plain(v) for k, v in value.items())
    if type(value) in (list, tuple, deque):
        return len(value) <= LONGEST and all(map(is_plain, value))
    return False


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def _mark(value: Any) -> Any:
    """A value that is equal as long as the attribute is unchanged, and holds none of its memory."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, int(checksum(value)))
    if isinstance(value, dict):
        return ("dict", tuple((key, _mark(item)) for key, item in value.items()))
    if isinstance(value, list | tuple | deque):
        return (type(value).__name__, tuple(map(_mark, value)))
    return (type(value).__name__, repr(value))


def _alike(value: Tensor, first: Any) -> bool:
    """True if a tensor was there, of this shape and type, when the object was built; others are what a pass left."""
    return first is not None and bool(first[:3] == ("tensor", tuple(value.shape), value.dtype))

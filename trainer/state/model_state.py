"""State of a user's model, as defined by its own `state_dict()` and `load_state_dict()`.

Most state dicts hold the live parameters and buffers: those are filled in place, without a second copy. All else (extra
state, copies made by hooks, buffers that overlap in memory, buffers of another shape than a new model's) is read into
new tensors, and passed to `load_state_dict()` or assigned in place of the buffer.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from everstep.errors import CheckpointError, ConfigError
from everstep.trainer.state.state_tree import pack, tensor_entries, unpack

PREFIX = "model."
_METHODS = ("state_dict", "_save_to_state_dict", "load_state_dict", "_load_from_state_dict")
_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class ModelState:
    """Packs a model's state for a checkpoint, and loads the state of a checkpoint into the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._targets: dict[str, Tensor] = {}

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Add the tensors of `state_dict()` to `tensors` as `model.NAME`; return the rest as JSON by name."""
        values: dict[str, Any] = {}
        for name, value in self.model.state_dict().items():
            packed = pack(value, PREFIX + name, tensors)
            if not isinstance(value, Tensor):
                values[name] = packed
        return values

    def allocate(
        self, metadata: dcp.Metadata, values: Mapping[str, Any], only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors to be filled from a checkpoint, by name; `load` then sets them in the model.

        Args:
            only: names of the state to take; None takes all, and then both sides must have the same names.

        Raises:
            CheckpointError: the checkpoint's names or the shapes of its parameters are not the model's.
        """
        nested = {entry["tensor"] for entry in tensor_entries(dict(values))}
        current = self.model.state_dict()
        buffers = {name: (module, leaf) for name, module, leaf in _buffers(self.model)}
        saved = {n.removeprefix(PREFIX) for n in metadata.state_dict_metadata if n.startswith(PREFIX)}
        saved = {name for name in saved if PREFIX + name not in nested}
        if only is None:
            self._check_names(current, saved, values, buffers)
        else:
            saved &= set(only)
        live = {_place(t) for t in (*self.model.parameters(), *self.model.buffers())}
        device = next((t.device for t in current.values() if isinstance(t, Tensor)), torch.device("cpu"))
        self._targets = {
            PREFIX + name: _target(name, current.get(name), _entry(metadata, PREFIX + name), live, buffers, device)
            for name in sorted(saved)
        }
        self._targets |= nested_targets(metadata, values, device)
        return self._targets

    def load(self, values: Mapping[str, Any]) -> None:
        """Set the filled tensors in the model, by `load_state_dict()` if the model has its own."""
        current = self.model.state_dict()
        given = OrderedDict(
            (name.removeprefix(PREFIX), tensor) for name, tensor in self._targets.items() if name.startswith(PREFIX)
        )
        for name, packed in values.items():
            given[name] = unpack(packed, self._targets)
            for entry in tensor_entries(packed):
                given.pop(entry["tensor"].removeprefix(PREFIX), None)
        self._put_buffers(given)
        if has_custom_state(self.model):
            whole = OrderedDict({**current, **given})
            # A module migrates a state without a version as one of an old version.
            whole._metadata = getattr(current, "_metadata", {})  # type: ignore[attr-defined]
            self._load_state_dict(whole)
        self._targets = {}

    def _put_buffers(self, given: Mapping[str, Any]) -> None:
        live = {_place(t) for t in self.model.buffers()}
        for name, module, leaf in _buffers(self.model):
            if name not in given or _place(given[name]) in live:
                continue
            buffer, value = module._buffers[leaf], given[name]
            if buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype:
                write(buffer, value)
            else:
                module._buffers[leaf] = value

    def _load_state_dict(self, given: Mapping[str, Any]) -> None:
        try:
            with _dense_buffers(self.model):
                self.model.load_state_dict(given)
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the model's load_state_dict() does not take what state_dict() gave: {type(error).__name__}: {said}"
            ) from error

    def _check_names(
        self, current: Mapping[str, Any], saved: set[str], values: Mapping[str, Any], buffers: Mapping[str, Any]
    ) -> None:
        there = saved | values.keys()
        optional = {name for name, (module, leaf) in buffers.items() if module._buffers[leaf] is None}
        missing = sorted(name for name in current if name not in there)
        if missing:
            raise CheckpointError(f"the checkpoint has no {PREFIX}{missing[0]} ({len(missing)} tensors are missing)")
        strange = sorted(name for name in there if name not in current and name not in optional)
        if strange:
            raise CheckpointError(
                f"the checkpoint has {PREFIX}{strange[0]}, which the model has not ({len(strange)} of that kind)"
            )


def has_custom_state(model: nn.Module) -> bool:
    """True if `load_state_dict()` does more than copy into the parameters and buffers of these names."""
    return any(_is_custom(module) for module in model.modules())


def _is_custom(module: nn.Module) -> bool:
    kind = type(module)
    if kind.get_extra_state is not nn.Module.get_extra_state or any(name in vars(module) for name in _METHODS):
        return True
    for name in _METHODS:
        if not getattr(kind, name).__module__.startswith("torch."):
            return True
    hooks = (hook for name in _HOOKS for hook in vars(module)[name].values())
    return any(not str(_module_of(hook)).startswith("torch.distributed.") for hook in hooks)


def _module_of(hook: Any) -> str:
    inner = getattr(hook, "hook", hook)
    return getattr(getattr(inner, "func", inner), "__module__", "")


def check_model(model: nn.Module) -> None:
    """Raise ConfigError for a model whose state no checkpoint can hold; needs no values and no memory."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ConfigError(f"the model's {name} has no shape yet (a lazy module): run one forward pass in model()")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConfigError(f"the model's {name} is a {tensor.layout} tensor; a checkpoint holds dense ones only")
    try:
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                pack(value, PREFIX + name, {})
    except CheckpointError as error:
        raise ConfigError(f"the model's state cannot be saved: {error}") from error
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"the model's state_dict() fails: {type(error).__name__}: {said}") from error


def write(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor whose elements may share memory (from `expand` or `as_strided`) to consistent values."""
    with torch.no_grad():
        if not _overlaps(tensor):
            tensor.copy_(value)
            return
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((last + 1,), (1,), tensor.storage_offset())
        places = torch.arange(last + 1, device=tensor.device).as_strided(tensor.shape, tensor.stride(), 0)
        flat[places.reshape(-1)] = value.to(tensor.device, tensor.dtype).reshape(-1)


def empty(entry: dcp.TensorStorageMetadata, device: torch.device) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def nested_targets(metadata: dcp.Metadata, values: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return an empty tensor for each that `values` names, on the CPU or on `device` as it was, by name."""
    return {
        saved["tensor"]: empty(_entry(metadata, saved["tensor"]), torch.device("cpu") if saved["on_host"] else device)
        for saved in tensor_entries(dict(values))
    }


def _overlaps(tensor: Tensor) -> bool:
    """True if two elements of a dense tensor may have one address in memory."""
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    end = 1
    for stride, size in dims:
        if stride < end:
            return True
        end = stride * (size - 1) + end
    return False


def _target(
    name: str,
    tensor: Any,
    entry: dcp.TensorStorageMetadata,
    live: set[Any],
    buffers: Mapping[str, Any],
    device: torch.device,
) -> Tensor:
    """Return the model's own tensor if it can be filled in place, else a new one."""
    if isinstance(tensor, Tensor):
        same = tensor.shape == entry.size and tensor.dtype == entry.properties.dtype
        is_live = _place(tensor) in live
        if not same and is_live and name not in buffers:
            raise CheckpointError(
                f"{PREFIX}{name} is {list(entry.size)} ({str(entry.properties.dtype)[6:]}) in the checkpoint, "
                f"{list(tensor.shape)} ({str(tensor.dtype)[6:]}) in the model"
            )
        if same and isinstance(tensor, DTensor):
            return tensor if is_live else torch.empty_like(tensor)
        if same and is_live and not _overlaps(tensor):
            return tensor.detach()
        return empty(entry, tensor.device)
    return empty(entry, device)


def _place(tensor: Any) -> tuple[Any, ...]:
    """Return address, type, shape and strides, which two names of one tensor have in common."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not isinstance(tensor, Tensor):
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _entry(metadata: dcp.Metadata, name: str) -> dcp.TensorStorageMetadata:
    entry = metadata.state_dict_metadata.get(name)
    if not isinstance(entry, dcp.TensorStorageMetadata):
        raise CheckpointError(f"the checkpoint has no tensor {name}")
    return entry


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, name within the module) of all persistent buffers, even of those set to None."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf in module._buffers:
            if leaf not in module._non_persistent_buffers_set:
                yield (f"{path}.{leaf}" if path else leaf), module, leaf


@contextlib.contextmanager
def _dense_buffers(model: nn.Module) -> Iterator[None]:
    """Replace overlapping buffers by dense ones during `load_state_dict`, which cannot write into them."""
    kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    for _, module, leaf in _buffers(model):
        buffer = module._buffers[leaf]
        if buffer is not None and not isinstance(buffer, DTensor) and _overlaps(buffer):
            dense = buffer.clone(memory_format=torch.contiguous_format)
            kept.append((module, leaf, buffer, dense))
            module._buffers[leaf] = dense
    try:
        yield
    finally:
        for module, leaf, buffer, dense in kept:
            if module._buffers[leaf] is dense:
                write(buffer, dense)
                module._buffers[leaf] = buffer

"""Nested state of user objects as named tensors and JSON.

A model's extra state, an optimizer's groups and a task's `state_dict()` may hold anything: numbers, text, lists, dicts,
tensors, arrays. Tensors are saved in the checkpoint under their own names, everything else in the manifest as JSON that
is read back without running code. An error names each value that neither can hold.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from everstep.errors import CheckpointError

KIND = "$"
"""Key of a JSON object that encodes a value for which JSON has no type."""
MAX_DEPTH = 32
"""Levels of containers; a container that contains itself has no end."""


def pack(value: Any, name: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return `value` as JSON, and add its tensors to `tensors` under names that begin with `name`.

    Raises:
        CheckpointError: a part of the value has a type that cannot be read back; the message names the part.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{name} is nested more than {MAX_DEPTH} levels deep; a checkpoint cannot hold it")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {KIND: "float", "of": repr(value)}
    if isinstance(value, Tensor):
        return _pack_tensor(value, name, tensors)
    if isinstance(value, dict | list | tuple | deque | set | frozenset):
        return _pack_container(value, name, tensors, depth + 1)
    return _pack_special(value, name, tensors)


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value from which `pack` made `packed`; `tensors` holds its tensors by name.

    Raises:
        CheckpointError: `packed` is not a result of `pack`.
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if KIND not in packed:
        return {key: unpack(item, tensors) for key, item in packed.items()}
    try:
        return _unpack_special(packed, tensors)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"the manifest holds a value that cannot be read: {error}") from error


def tensor_entries(packed: Any) -> list[dict[str, Any]]:
    """Return the entries of all tensors in a packed value."""
    if isinstance(packed, list):
        return [entry for item in packed for entry in tensor_entries(item)]
    if not isinstance(packed, dict):
        return []
    if "tensor" in packed and KIND in packed:
        return [packed]
    return [entry for item in packed.values() for entry in tensor_entries(item)]


def is_number(kind: np.dtype[Any]) -> bool:
    """True if a checkpoint holds arrays of a NumPy type: booleans and numbers, no long double."""
    return kind.kind in "biufc" and kind.itemsize <= (16 if kind.kind == "c" else 8)


def _pack_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(f"{name} is a {value.layout} tensor of {value.dtype}; a checkpoint holds dense ones only")
    _add(name, value.detach(), tensors)
    entry: dict[str, Any] = {KIND: "tensor", "tensor": name, "on_host": value.device.type == "cpu"}
    if isinstance(value, DTensor):
        if any(place.is_partial() for place in value.placements):
            raise CheckpointError(f"{name} is a partial sum over the ranks; a checkpoint cannot hold it")
        entry["shard_dim"] = next((place.dim for place in value.placements if isinstance(place, Shard)), None)
    return entry


def _pack_container(value: Any, name: str, tensors: dict[str, Tensor], depth: int) -> Any:
    kind = _CONTAINERS.get(type(value))
    if kind is None:
        raise CheckpointError(f"{name} is a {type(value).__name__}; a checkpoint holds plain dicts, lists and tuples")
    if kind in ("set", "frozenset"):
        value = sorted(value, key=repr)
    if isinstance(value, dict):
        if kind == "dict" and all(type(key) is str and key != KIND for key in value):
            return {key: pack(item, f"{name}.{key}", tensors, depth) for key, item in value.items()}
        pairs = [[_pack_key(key, name), pack(item, f"{name}.{key}", tensors, depth)] for key, item in value.items()]
        return {KIND: kind, "of": pairs}
    items = [pack(item, f"{name}.{number}", tensors, depth) for number, item in enumerate(value)]
    if kind == "list":
        return items
    return {KIND: kind, "of": items, **({"maxlen": value.maxlen} if isinstance(value, deque) else {})}


def _pack_key(key: Any, name: str) -> Any:
    if not (key is None or type(key) in (bool, int, str)) and not _is_plain_tuple(key):
        raise CheckpointError(f"{name} has a key of type {type(key).__name__}; a checkpoint holds text and numbers")
    return pack(key, name, {})


def _is_plain_tuple(key: Any) -> bool:
    return type(key) is tuple and all(type(part) in (bool, int, str) for part in key)


def _pack_special(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, np.ndarray) and is_number(value.dtype):
        whole = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        return {**_pack_tensor(whole, name, tensors), KIND: "array"}
    if isinstance(value, np.generic) and is_number(value.dtype):
        return {KIND: "number", "dtype": value.dtype.str, "of": value.tobytes().hex()}
    if isinstance(value, bytes | bytearray | io.BytesIO):
        data = value.getvalue() if isinstance(value, io.BytesIO) else bytes(value)
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return {**_pack_tensor(content, name, tensors), KIND: type(value).__name__.lower()}
    if isinstance(value, complex):
        return {KIND: "complex", "of": [repr(value.real), repr(value.imag)]}
    if isinstance(value, torch.dtype | torch.device):
        return {KIND: type(value).__name__, "of": str(value).removeprefix("torch.")}
    raise CheckpointError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors, arrays, "
        "numbers, text and plain containers of them"
    )


def _unpack_special(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    kind = packed[KIND]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](unpack(item, tensors) for item in packed["of"])
    if kind == "deque":
        return deque((unpack(item, tensors) for item in packed["of"]), packed["maxlen"])
    if kind in ("dict", "ordered"):
        pairs = ((unpack(key, tensors), unpack(item, tensors)) for key, item in packed["of"])
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind in _SCALARS:
        return _SCALARS[kind](packed)
    value = tensors[packed["tensor"]]
    if kind == "tensor":
        return value
    array = value.cpu().numpy()
    if kind == "array":
        return array.copy()
    return {"bytes": bytes, "bytearray": bytearray, "bytesio": io.BytesIO}[kind](array.tobytes())


def _add(name: str, value: Tensor, tensors: dict[str, Tensor]) -> None:
    if name in tensors:
        raise CheckpointError(f"two tensors of the state are called {name}; rename one of them")
    tensors[name] = value


def _dtype(packed: Mapping[str, Any]) -> torch.dtype:
    found = vars(torch).get(packed["of"])
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{packed['of']!r} is not a type of tensor")
    return found


_CONTAINERS: dict[type, str] = {
    dict: "dict",
    OrderedDict: "ordered",
    list: "list",
    tuple: "tuple",
    torch.Size: "size",
    deque: "deque",
    set: "set",
    frozenset: "frozenset",
}
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "size": torch.Size, "set": set, "frozenset": frozenset}
_SCALARS: dict[str, Any] = {
    "float": lambda packed: float(packed["of"]),
    "number": lambda packed: np.frombuffer(bytes.fromhex(packed["of"]), np.dtype(packed["dtype"]))[0],
    "complex": lambda packed: complex(*map(float, packed["of"])),
    "dtype": _dtype,
    "device": lambda packed: torch.device(packed["of"]),
}

"""JSON between ranks, over the CPU part of their group; nothing that arrives is unpickled.

A value that JSON would change (a tuple, a key that is not a string) is a programming error; one that JSON cannot hold
raises TypeError.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from everstep.errors import EverstepError


def broadcast(value: Any, rank: int) -> Any:
    """Return rank 0's value on all ranks; rank 0 too gets it back from JSON."""
    data = _tensor(value) if rank == 0 else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(data)])
    dist.broadcast(length, src=0)
    data = data if rank == 0 else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return _value(data)


def gather(value: Any, world: int) -> list[Any]:
    """Return each rank's value, on all ranks."""
    data = _tensor(value)
    lengths = _lengths(data, world)
    parts = [torch.empty(max(lengths), dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(parts, _padded(data, max(lengths)))
    return [_value(part[:length]) for part, length in zip(parts, lengths, strict=True)]


def gather_on_main(value: Any, rank: int, world: int) -> list[Any]:
    """Return each rank's value on rank 0; nothing on the others."""
    data = _tensor(value)
    lengths = _lengths(data, world)
    parts = [torch.empty(max(lengths), dtype=torch.uint8) for _ in range(world)] if rank == 0 else None
    dist.gather(_padded(data, max(lengths)), parts, dst=0)
    return [_value(part[:length]) for part, length in zip(parts or [], lengths, strict=False)]


def scatter(values: Sequence[Any], rank: int, world: int) -> Any:
    """Return the value that rank 0 has for this rank.

    Args:
        values: one for each rank; empty on the other ranks.
    """
    sent = [_tensor(value) for value in values]
    lengths = torch.tensor([len(data) for data in sent] or [0] * world)
    dist.broadcast(lengths, src=0)
    longest = int(lengths.max())
    data = torch.empty(longest, dtype=torch.uint8)
    dist.scatter(data, [_padded(each, longest) for each in sent] if rank == 0 else None, src=0)
    return _value(data[: int(lengths[rank])])


def _tensor(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


def _lengths(data: Tensor, world: int) -> list[int]:
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(found, torch.tensor([len(data)]))
    return [int(each) for each in found]


def _padded(data: Tensor, length: int) -> Tensor:
    return torch.cat([data, data.new_zeros(length - len(data))])


def pack_error(error: EverstepError) -> dict[str, Any]:
    """Return the kinds of the error (its own first), its text and its plain fields."""
    kinds = [kind.__qualname__ for kind in type(error).__mro__ if issubclass(kind, EverstepError)]
    fields = {name: value for name, value in vars(error).items() if isinstance(value, (str, int, float, type(None)))}
    return {"kinds": kinds, "text": str(error), "fields": fields}


def unpack_error(packed: dict[str, Any]) -> EverstepError:
    """Return an error of the nearest kind that this process knows; no constructor is called."""
    known = _kinds(EverstepError)
    kind = next((known[name] for name in packed["kinds"] if name in known), EverstepError)
    error = kind.__new__(kind, packed["text"])
    vars(error).update(packed["fields"])
    return error


def _kinds(root: type[EverstepError]) -> dict[str, type[EverstepError]]:
    found = {root.__qualname__: root}
    for kind in root.__subclasses__():
        found |= _kinds(kind)
    return found

"""`tensors.json`: type, shape and location of every tensor of a checkpoint.

It is JSON, where DCP itself has a pickle: nothing in a checkpoint is ever unpickled, and nothing in this file is used
before it is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from everstep.errors import CheckpointError
from everstep.storage import Buffer, Storage
from everstep.storage.names import is_plain, leads_out
from everstep.trainer.checkpoint.manifest import TENSORS


@dataclass(frozen=True)
class Chunk:
    """Location of one piece of a tensor: bytes [start, start + length) of a file."""

    file: str
    start: int
    length: int
    dtype: torch.dtype
    sizes: tuple[int, ...]


def decode(data: Buffer | bytearray, chunk: Chunk) -> Tensor:
    if len(data) != chunk.length:
        raise CheckpointError(f"{chunk.file} ends within a tensor: {len(data)} bytes where {chunk.length} should be")
    if not data:
        return torch.empty(chunk.sizes, dtype=chunk.dtype)
    writable = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(writable, dtype=chunk.dtype).reshape(chunk.sizes)


def read_metadata(storage: Storage, folder: str) -> dcp.Metadata:
    """Return shapes, types and locations of all tensors of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        _check_links(storage, folder, {TENSORS})
        data = storage.read(f"{folder}/{TENSORS}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}/{TENSORS} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/{TENSORS} is damaged: {error}") from error
    return parse_metadata(storage, folder, data)


def parse_metadata(storage: Storage, folder: str, data: bytes) -> dcp.Metadata:
    """Return the same as `read_metadata` from the file's bytes."""
    try:
        metadata = _parse(json.loads(data))
        _check_links(storage, folder, {chunk.file for chunk in metadata.storage_data.values()})
        return metadata
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder}/{TENSORS} is damaged: {type(error).__name__}: {error}") from error


def read_whole(storage: Storage, folder: str, metadata: dcp.Metadata, name: str) -> Tensor:
    """Return one tensor put together from its chunks, on the CPU."""
    entry = metadata.state_dict_metadata[name]
    if not isinstance(entry, dcp.TensorStorageMetadata):
        raise CheckpointError(f"{folder}: {name} is not a tensor")
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    for piece in entry.chunks:
        chunk = metadata.storage_data[dcp.MetadataIndex(name, piece.offsets)]
        target = whole
        for dim, (start, length) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
            target = target.narrow(dim, start, length)
        data = storage.read_range(f"{folder}/{chunk.file}", chunk.start, chunk.start + chunk.length)
        target.copy_(decode(data, chunk))
    return whole


def _parse(described: Mapping[str, Any]) -> dcp.Metadata:
    entries: dict[str, dcp.STORAGE_TYPES] = {}
    chunks: dict[dcp.MetadataIndex, Chunk] = {}
    for name, entry in described.items():
        dtype, shape = vars(torch).get(entry["dtype"]), torch.Size(entry["shape"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{entry['dtype']!r} is not a type of tensor")
        pieces = []
        for piece in entry["chunks"]:
            offsets, sizes = torch.Size(piece["offsets"]), torch.Size(piece["sizes"])
            chunk = Chunk(piece["file"], piece["start"], piece["length"], dtype, tuple(sizes))
            _check_chunk(name, shape, offsets, chunk)
            pieces.append(dcp.ChunkStorageMetadata(offsets, sizes))
            chunks[dcp.MetadataIndex(name, offsets)] = chunk
        if sum(piece.sizes.numel() for piece in pieces) != shape.numel():
            raise ValueError(f"the pieces of {name} do not make up its shape {list(shape)}")
        entries[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), shape, pieces)
    return dcp.Metadata(entries, storage_data=chunks)


def _check_links(storage: Storage, folder: str, files: set[str]) -> None:
    """Raise ValueError for a link out of the folder, also of a file that the manifest does not list."""
    for name in sorted(files):
        if leads_out(storage, folder, name):
            raise ValueError(f"{name} is a link out of the checkpoint")


def _check_chunk(name: str, shape: torch.Size, offsets: torch.Size, chunk: Chunk) -> None:
    if not is_plain(chunk.file):
        raise ValueError(f"{chunk.file!r} lies outside the checkpoint")
    inside = all(o >= 0 and n >= 0 and o + n <= d for o, n, d in zip(offsets, chunk.sizes, shape, strict=True))
    if not inside or chunk.start < 0 or chunk.length != math.prod(chunk.sizes) * chunk.dtype.itemsize:
        raise ValueError(f"a piece of {name} does not fit its shape {list(shape)} or its bytes")

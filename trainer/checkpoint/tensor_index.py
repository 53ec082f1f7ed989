"""`tensors.json`: type, shape and location of every tensor of a checkpoint.

It is JSON, where DCP itself has a pickle: nothing in a checkpoint is ever unpickled, and nothing in this file is used
before it is checked (tensor_table.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from everstep.errors import CheckpointError
from everstep.run_folder import MANIFEST
from everstep.storage import Buffer, Storage, read_limited
from everstep.storage.names import leads_out
from everstep.trainer.checkpoint.manifest import TENSORS, Files, Manifest, read_manifest
from everstep.trainer.checkpoint.tensor_table import MOST_BYTES, TableEntry, parse_table


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
        CheckpointError: the file or the manifest is missing or damaged.
    """
    try:
        _check_links(storage, folder, {TENSORS})
        data = read_limited(storage, f"{folder}/{TENSORS}", MOST_BYTES)
        manifest = Manifest.from_json(read_manifest(storage, folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}/{TENSORS} is missing, or its {MANIFEST}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/{TENSORS} is damaged: {error}") from error
    return parse_metadata(storage, folder, data, manifest.files)


def parse_metadata(storage: Storage, folder: str, data: bytes, files: Files) -> dcp.Metadata:
    """Return the same as `read_metadata` from the file's bytes, and the files that the manifest lists."""
    try:
        metadata = _metadata(parse_table(data, files))
        _check_links(storage, folder, {chunk.file for chunk in metadata.storage_data.values()})
        return metadata
    except ValueError as error:
        raise CheckpointError(f"{folder}/{TENSORS} is damaged: {error}") from error


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


def _metadata(table: Mapping[str, TableEntry]) -> dcp.Metadata:
    entries: dict[str, dcp.STORAGE_TYPES] = {}
    chunks: dict[dcp.MetadataIndex, Chunk] = {}
    for name, entry in table.items():
        dtype = vars(torch)[entry.dtype]
        pieces = []
        for piece in entry.pieces:
            offsets = torch.Size(piece.offsets)
            pieces.append(dcp.ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
            chunks[dcp.MetadataIndex(name, offsets)] = Chunk(piece.file, piece.start, piece.length, dtype, piece.sizes)
        entries[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype), torch.Size(entry.shape), pieces)
    return dcp.Metadata(entries, storage_data=chunks)


def _check_links(storage: Storage, folder: str, files: set[str]) -> None:
    """Raise ValueError for a link out of the folder, also of a file that the manifest does not list."""
    for name in sorted(files):
        if leads_out(storage, folder, name):
            raise ValueError(f"{name} is a link out of the checkpoint")

"""torch.distributed.checkpoint's reader and writer on our storage, with JSON in place of its pickled metadata.

Each rank streams its tensors into one file, digesting the bytes as they pass; the coordinator writes `tensors.json`,
which says where each chunk of each tensor lies. Nothing in a checkpoint is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)  # fmt: skip
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainer.checkpoint.manifest import TENSORS, FileRecord, is_plain, leads_out
from trainer.errors import CheckpointError
from trainer.storage import Storage


@dataclass(frozen=True)
class Chunk:
    """Where one piece of a tensor lies: bytes [start, start + length) of a file."""

    file: str
    start: int
    length: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    record: FileRecord | None = None
    """Size and digest of the whole file; only the writer needs it."""


class Writer(StorageWriter):
    """Writes one checkpoint folder; `files` holds all of its files once DCP is through, on the coordinator."""

    def __init__(self, storage: Storage, folder: str, rank: int) -> None:
        self.storage = storage
        self.folder = folder
        self.file = f"rank-{rank:04d}.tensors"
        self.files: dict[str, FileRecord] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.files = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        digest, position, written = blake3(), 0, []
        with self.storage.writer(f"{self.folder}/{self.file}") as file:
            for item in plan.items:
                tensor = _tensor(item, planner)
                data = encode(tensor)
                file.write(data)
                digest.update(data)
                written.append((item.index, Chunk(self.file, position, len(data), tensor.dtype, tuple(tensor.shape))))
                position += len(data)
        record = FileRecord(position, digest.hexdigest())
        return [WriteResult(index, c.length, dataclasses.replace(c, record=record)) for index, c in written]

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[dcp.MetadataIndex, Chunk] = {r.index: r.storage_data for rank in results for r in rank}
        self.files = {chunk.file: chunk.record for chunk in chunks.values() if chunk.record is not None}
        text = json.dumps(_describe(metadata, chunks), sort_keys=True).encode()
        self.storage.write(f"{self.folder}/{TENSORS}", text)
        self.files[TENSORS] = FileRecord(len(text), blake3(text).hexdigest())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(StorageReader):
    """Reads what a `Writer` wrote; each rank fetches only the chunks that its plan names."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage = storage
        self.folder = folder
        self._chunks: dict[dcp.MetadataIndex, Chunk] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._chunks = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        return read_metadata(self.storage, self.folder)

    def set_up_storage_reader(self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._chunks = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._chunks[item.storage_index].file].append(item)
        for items in by_file.values():
            for item in sorted(items, key=lambda i: self._chunks[i.storage_index].start):
                self._read(item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type is not LoadItemType.TENSOR:
            raise CheckpointError(f"{self.folder}: {item.dest_index.fqn} is not a tensor; refusing to unpickle it")
        chunk = self._chunks[item.storage_index]
        data = self.storage.read_range(f"{self.folder}/{chunk.file}", chunk.start, chunk.start + chunk.length)
        source = decode(data, chunk)
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            source = source.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(source)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def encode(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def decode(data: bytes, chunk: Chunk) -> Tensor:
    if len(data) != chunk.length:
        raise CheckpointError(f"{chunk.file} ends within a tensor: {len(data)} bytes where {chunk.length} should be")
    if not data:
        return torch.empty(chunk.sizes, dtype=chunk.dtype)
    return torch.frombuffer(bytearray(data), dtype=chunk.dtype).reshape(chunk.sizes)


def read_metadata(storage: Storage, folder: str) -> dcp.Metadata:
    """Shapes, types and places of all tensors of a checkpoint; CheckpointError when the file is not sound."""
    try:
        _check_links(storage, folder, {TENSORS})
        metadata = _parse(json.loads(storage.read(f"{folder}/{TENSORS}")))
        _check_links(storage, folder, {chunk.file for chunk in metadata.storage_data.values()})
        return metadata
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder}/{TENSORS} is damaged: {type(error).__name__}: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}/{TENSORS} is missing") from error


def read_whole(storage: Storage, folder: str, metadata: dcp.Metadata, name: str) -> Tensor:
    """One tensor put together from its chunks, on the CPU."""
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


def _tensor(item: WriteItem, planner: SavePlanner) -> Tensor:
    data = planner.resolve_data(item)
    if item.type is WriteItemType.BYTE_IO or not isinstance(data, Tensor):
        raise CheckpointError(f"{item.index.fqn} is not a tensor; only tensors are saved")
    return data


def _describe(metadata: dcp.Metadata, chunks: dict[dcp.MetadataIndex, Chunk]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, dcp.TensorStorageMetadata):
            raise CheckpointError(f"{name} is not a tensor; only tensors are saved")
        pieces = []
        for piece in entry.chunks:
            chunk = chunks[dcp.MetadataIndex(name, piece.offsets)]
            pieces.append({"offsets": list(piece.offsets), "sizes": list(piece.sizes), "file": chunk.file,
                           "start": chunk.start, "length": chunk.length})  # fmt: skip
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        described[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": pieces}
    return described


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
    """A file that the manifest does not list has been held to nothing yet, so this does not rest on the manifest."""
    for name in sorted(files):
        if leads_out(storage, folder, name):
            raise ValueError(f"{name} is a link out of the checkpoint")


def _check_chunk(name: str, shape: torch.Size, offsets: torch.Size, chunk: Chunk) -> None:
    if not is_plain(chunk.file):
        raise ValueError(f"{chunk.file!r} lies outside the checkpoint")
    inside = all(o >= 0 and n >= 0 and o + n <= d for o, n, d in zip(offsets, chunk.sizes, shape, strict=True))
    if not inside or chunk.start < 0 or chunk.length != math.prod(chunk.sizes) * chunk.dtype.itemsize:
        raise ValueError(f"a piece of {name} does not fit its shape {list(shape)} or its bytes")

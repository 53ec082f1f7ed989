"""Read tensors from a checkpoint: each file a rank needs is read once, digested and copied out.

torch.distributed.checkpoint plans which bytes of which saved tensors a rank needs, for any world size and any way to
shard the model. The digest is known only at the end of a file: tensors copied from a damaged file must be discarded.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from everstep.errors import CheckpointError
from everstep.storage import Buffer, Storage
from everstep.storage.names import leads_out
from everstep.trainer.checkpoint.manifest import READ_BYTES, Manifest
from everstep.trainer.checkpoint.tensor_index import Chunk, decode

AHEAD = 3
"""Blocks of a file that are requested ahead of the current one."""


class DamagedError(CheckpointError):
    """A file differs from its record in the manifest."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """One committed checkpoint in one storage."""

    storage: Storage
    path: str
    metadata: dcp.Metadata
    manifest: Manifest


def fill(tensors: dict[str, Tensor], source: OpenCheckpoint, rank: int = 0) -> None:
    """Fill this rank's tensors, in place.

    Args:
        rank: index of the file to begin with, so that the ranks do not all read the same file at once.

    Raises:
        DamagedError: a file with tensors of this rank is damaged.
    """
    planner, items = _plan(tensors, source)
    fill_items(planner, items, source, rank)


def fill_items(planner: LoadPlanner, items: Iterable[ReadItem], source: OpenCheckpoint, rank: int = 0) -> None:
    """Fill what a plan of torch.distributed.checkpoint asks for; `rank` and errors as in `fill`."""
    needed: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
    for item in items:
        chunk = _chunk(source, item)
        needed[chunk.file].append((chunk, item))
    names = sorted(needed)
    for name in names[rank % max(1, len(names)) :] + names[: rank % max(1, len(names))]:
        wanted = sorted(needed[name], key=lambda pair: pair[0].start)

        def read(name: str = name, wanted: list[tuple[Chunk, ReadItem]] = wanted) -> None:
            _read_file(source, name, [TensorTarget(i, c, planner.resolve_tensor(i).detach()) for c, i in wanted])

        try:
            read()
        except DamagedError:
            if source.storage.path() is not None:
                raise
            read()  # a store's file may be damaged by the network: only a second failure counts


def files_needed(tensors: dict[str, Tensor], source: OpenCheckpoint) -> set[str]:
    """Return the files that `fill` would read."""
    return {_chunk(source, item).file for item in _plan(tensors, source)[1]}


def _plan(tensors: dict[str, Tensor], source: OpenCheckpoint) -> tuple[DefaultLoadPlanner, list[ReadItem]]:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(dict(tensors), source.metadata)
    return planner, planner.finish_plan(planner.create_local_plan()).items


def _chunk(source: OpenCheckpoint, item: ReadItem) -> Chunk:
    if item.type is not LoadItemType.TENSOR:
        raise CheckpointError(f"{source.path}: {item.dest_index.fqn} is not a tensor; refusing to unpickle it")
    chunk: Chunk = source.metadata.storage_data[item.storage_index]
    record = source.manifest.files.get(chunk.file)
    if record is None:
        raise CheckpointError(f"{source.path}: the manifest does not list {chunk.file}, where tensors should be")
    if chunk.start + chunk.length > record.bytes:
        raise CheckpointError(f"{source.path}: {chunk.file} ends within a tensor, at {record.bytes} bytes")
    return chunk


class TensorTarget:
    """Destination of a saved piece of a tensor."""

    def __init__(self, item: ReadItem, chunk: Chunk, target: Tensor) -> None:
        self.chunk = chunk
        self.end = chunk.start + chunk.length
        self._item = item
        self._target = target
        whole = tuple(item.lengths) == chunk.sizes and target.dtype == chunk.dtype and target.is_contiguous()
        self._bytes = target.reshape(-1).view(torch.uint8) if whole and chunk.length else None
        self._part = bytearray(0 if whole else chunk.length)

    def take(self, start: int, block: Tensor) -> None:
        """Copy the bytes that belong to this piece from a block that begins at `start` in the file."""
        first, last = max(start, self.chunk.start), min(start + len(block), self.end)
        if first >= last:
            return
        piece = block[first - start : last - start]
        at = first - self.chunk.start
        if self._bytes is not None:
            self._bytes[at : at + len(piece)].copy_(piece)
        elif self._part:
            self._part[at : at + len(piece)] = memoryview(piece.numpy())  # type: ignore[arg-type]

    def finish(self) -> None:
        if not self._part:
            return
        source = decode(self._part, self.chunk)
        for dim, (start, length) in enumerate(zip(self._item.storage_offsets, self._item.lengths, strict=True)):
            source = source.narrow(dim, start, length)
        self._target.copy_(source)
        self._part = bytearray()


def _read_file(source: OpenCheckpoint, name: str, targets: list[TensorTarget]) -> None:
    """Read one file, copy its pieces out and verify its digest."""
    if leads_out(source.storage, source.path, name):
        raise DamagedError(f"{name} is a link out of the checkpoint")
    record, digest, waiting = source.manifest.files[name], blake3(), targets
    # The blocks are only read, so torch's warning about buffers that are not writable does not apply.
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    with ThreadPoolExecutor(1, thread_name_prefix="copy") as beside:
        for start, data in _blocks(source.storage, f"{source.path}/{name}", record.bytes):
            copying = beside.submit(_copy_out, waiting, start, data)  # copied while it is digested
            digest.update(data)
            waiting = copying.result()
    if digest.hexdigest() != record.blake3:
        raise DamagedError(f"{name} does not match its BLAKE3")


def _copy_out(targets: list[TensorTarget], start: int, data: Buffer) -> list[TensorTarget]:
    """Copy out a block of the file; return the destinations that are not complete."""
    block, stop = torch.frombuffer(data, dtype=torch.uint8), start + len(data)
    for target in targets:
        if target.chunk.start >= stop:
            break
        target.take(start, block)
        if target.end <= stop:
            target.finish()
    return [target for target in targets if target.end > stop]


def _blocks(storage: Storage, path: str, size: int) -> Iterator[tuple[int, Buffer]]:
    """Yield the file's bytes in order, with some blocks read ahead."""
    starts = range(0, size, READ_BYTES)

    def read(start: int) -> Buffer:
        stop = min(size, start + READ_BYTES)
        try:
            data = storage.read_range(path, start, stop)
        except FileNotFoundError as error:
            raise DamagedError(f"{path.rsplit('/', 1)[-1]} is missing") from error
        if len(data) != stop - start:
            raise DamagedError(f"{path.rsplit('/', 1)[-1]} has {start + len(data)} bytes, not {size}")
        return data

    with ThreadPoolExecutor(AHEAD, thread_name_prefix="restore") as pool:
        ahead = [pool.submit(read, start) for start in starts[:AHEAD]]
        for number, start in enumerate(starts):
            if number + AHEAD < len(starts):
                ahead.append(pool.submit(read, starts[number + AHEAD]))
            yield start, ahead.pop(0).result()

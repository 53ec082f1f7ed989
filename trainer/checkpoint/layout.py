"""Layout of a checkpoint: the bytes that each rank writes, and their files.

torch.distributed.checkpoint plans the layout once, and every later save uses it. A rank's file holds its pieces one
after the other, each at a multiple of `ALIGN`. Offsets follow from the plan alone, so `tensors.json` is known before
any byte is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from everstep.errors import CheckpointError
from everstep.trainer.distributed.mesh import Mesh

ALIGN = 64
"""Bytes; a tensor of any type may begin at a multiple of it."""

Rows = list[list[Any]]
"""A plan of torch.distributed.checkpoint as JSON, one row for each item."""
Key = tuple[tuple[str, torch.Size, torch.dtype], ...]


@dataclass(frozen=True)
class Piece:
    """One tensor, or this rank's shard of it, as bytes [start, start + length) of the rank's file."""

    item: WriteItem
    start: int
    length: int
    dtype: torch.dtype
    sizes: torch.Size


class Layout:
    """Pieces that one rank writes, and the index of the pieces of all ranks."""

    def __init__(
        self, rank: int, pieces: list[Piece], planner: DefaultSavePlanner, table: bytes, sizes: list[int], key: Key
    ) -> None:
        self.file = file_of(rank)
        self.pieces = pieces
        self.table = table
        """`tensors.json`, with the pieces of all ranks."""
        self.sizes = sizes
        """Bytes of each rank's file."""
        self.key = key
        self._planner = planner

    @property
    def bytes(self) -> int:
        return _end(self.pieces)

    def local(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the current tensors of the pieces, in their order."""
        self._planner.set_up_planner(dict(tensors))
        found = [self._planner.resolve_data(piece.item) for piece in self.pieces]
        return [tensor.detach() for tensor in found if isinstance(tensor, Tensor)]


def key_of(tensors: Mapping[str, Tensor]) -> Key:
    """Return the key of a layout, equal on all ranks: of a DTensor it has the full shape."""
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


def lay_out(tensors: Mapping[str, Tensor], mesh: Mesh) -> Layout:
    """Plan the layout with all ranks; a tensor that several ranks hold alike is written by one of them."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), None, mesh.is_main)
    known: list[list[Any]] = []

    def share_out(plans: list[Rows]) -> list[Rows]:
        shares, metadata = planner.create_global_plan([_plan(rows) for rows in plans])
        placed = [place(share.items) for share in shares]
        table = json.dumps(_describe(metadata, placed), sort_keys=True)
        known.append([table, [_end(pieces) for pieces in placed]])
        return [_rows(share) for share in shares]

    mine = _plan(mesh.exchange(_rows(planner.create_local_plan()), share_out))
    planner.finish_plan(mine)
    table, sizes = mesh.decide(lambda: known[0])
    return Layout(mesh.rank, place(mine.items), planner, table.encode(), sizes, key_of(tensors))


def _rows(plan: SavePlan) -> Rows:
    """Return a plan as JSON; what is not in a row has the same default on all ranks.

    Raises:
        CheckpointError: the plan holds something other than tensors.
    """
    rows = []
    for item in plan.items:
        if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
            raise CheckpointError(f"{item.index.fqn} is not a tensor; only tensors are saved")
        data, at = item.tensor_data, item.index.offset
        dtype = str(data.properties.dtype).removeprefix("torch.")
        offset = None if at is None else list(at)
        chunk = [list(data.chunk.offsets), list(data.chunk.sizes)]
        rows.append([item.index.fqn, offset, item.index.index, item.type.name, *chunk, dtype, list(data.size)])
    return rows


def _plan(rows: Rows) -> SavePlan:
    items = []
    for name, at, index, kind, offsets, sizes, dtype, size in rows:
        where = dcp.MetadataIndex(name, None if at is None else torch.Size(at), index)
        chunk = dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        properties = dcp.TensorProperties(dtype=getattr(torch, dtype))
        data = TensorWriteData(chunk, properties, torch.Size(size))
        items.append(WriteItem(where, WriteItemType[kind], tensor_data=data))
    return SavePlan(items, planner_data={})


def _end(pieces: list[Piece]) -> int:
    return pieces[-1].start + pieces[-1].length if pieces else 0


def file_of(rank: int) -> str:
    return f"rank-{rank:04d}.tensors"


def place(items: Iterable[WriteItem]) -> list[Piece]:
    """Return the pieces of one file, in the order of their bytes."""
    pieces, end = [], 0
    for item in items:
        if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
            raise CheckpointError(f"{item.index.fqn} is not a tensor; only tensors are saved")
        sizes, dtype = item.tensor_data.chunk.sizes, item.tensor_data.properties.dtype
        start = -(-end // ALIGN) * ALIGN
        pieces.append(Piece(item, start, math.prod(sizes) * dtype.itemsize, dtype, sizes))
        end = start + pieces[-1].length
    return pieces


def _describe(metadata: dcp.Metadata, placed: list[list[Piece]]) -> dict[str, Any]:
    where = {piece.item.index: (file_of(rank), piece) for rank, pieces in enumerate(placed) for piece in pieces}
    described: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, dcp.TensorStorageMetadata):
            raise CheckpointError(f"{name} is not a tensor; only tensors are saved")
        chunks = []
        for part in entry.chunks:
            file, piece = where[dcp.MetadataIndex(name, part.offsets)]
            chunks.append(
                {
                    "offsets": list(part.offsets),
                    "sizes": list(part.sizes),
                    "file": file,
                    "start": piece.start,
                    "length": piece.length,
                }
            )
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        described[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
    return described

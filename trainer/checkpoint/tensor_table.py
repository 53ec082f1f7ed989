"""Parse `tensors.json` and check every field. This module imports no torch.

The pieces of a tensor tile it exactly, so no element is left as the memory was before, and all fit into their files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from everstep.checked_json import mapping, parse, record, sequence, shown, text, whole
from everstep.storage.names import is_plain
from everstep.trainer.checkpoint.manifest import Files

MOST_BYTES = 1 << 30
"""Size of the file."""
PIECES_A_FILE = 64
"""Pieces of one tensor in one file; a rank writes one."""
MOST_DIMENSIONS, LONGEST_DIMENSION, MOST_ELEMENTS = 64, 1 << 40, 1 << 56
LONGEST_TENSOR_NAME = 4096
ITEM_BYTES = {
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": bits // 8 for bits in (16, 32, 64)},
    **{f"complex{bits}": bits // 8 for bits in (32, 64, 128)},
    **{f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")},
    "bfloat16": 2,
    "bool": 1,
}
"""Bytes of an element by torch's name of its type: all types that can be made of bytes."""
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class TablePiece:
    """A box of a tensor, as bytes [start, start + length) of a file."""

    offsets: Numbers
    sizes: Numbers
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class TableEntry:
    """One tensor."""

    dtype: str
    shape: Numbers
    pieces: tuple[TablePiece, ...]


def parse_table(data: bytes, files: Files) -> dict[str, TableEntry]:
    """Return the tensors by name.

    Raises:
        ValueError: a field is not as it is written, a tensor is not tiled by its pieces, or the files are too small.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes (limit {MOST_BYTES})")
    entries: dict[str, TableEntry] = {}
    used: Counter[str] = Counter()
    for name, described in mapping(parse(data), "it").items():
        text(name, "the name of a tensor", LONGEST_TENSOR_NAME)
        entries[name] = entry = _entry(shown(name), described, files)
        for piece in entry.pieces:
            used[piece.file] += piece.length
    for file, size in used.items():
        if size > files[file].bytes:
            raise ValueError(f"its tensors have {size} bytes in {shown(file)}, which has {files[file].bytes}")
    return entries


def _entry(name: str, described: object, files: Files) -> TableEntry:
    kind, dimensions, listed = record(described, name, "dtype", "shape", "chunks")
    if type(kind) is not str or kind not in ITEM_BYTES:
        raise ValueError(f"{name}: {shown(kind)} is not a type of tensor")
    shape = _numbers(dimensions, f"the shape of {name}")
    whole(math.prod(max(1, size) for size in shape), f"the number of elements of {name}", 0, MOST_ELEMENTS)
    most = PIECES_A_FILE * len(files)
    pieces = [_piece(name, each, shape, kind, files) for each in sequence(listed, f"the pieces of {name}", most)]
    if not tiles(shape, [(piece.offsets, piece.sizes) for piece in pieces]):
        raise ValueError(f"the pieces of {name} do not make up its shape {list(shape)}")
    return TableEntry(kind, shape, tuple(pieces))


def _piece(name: str, described: object, shape: Numbers, kind: str, files: Files) -> TablePiece:
    where, extent, file, start, length = record(
        described, f"a piece of {name}", "offsets", "sizes", "file", "start", "length"
    )
    offsets, sizes = _numbers(where, f"offsets of {name}"), _numbers(extent, f"sizes of {name}")
    if not is_plain(file):
        raise ValueError(f"{shown(file)} lies outside the checkpoint")
    if file not in files:
        raise ValueError(f"the manifest does not list {shown(file)}, where a piece of {name} should be")
    whole(start, f"start of {name}", 0, files[file].bytes)
    whole(length, f"length of {name}", 0, files[file].bytes - start)
    inside = len(offsets) == len(sizes) == len(shape) and all(
        offset + size <= limit for offset, size, limit in zip(offsets, sizes, shape, strict=True)
    )
    if not inside or length != math.prod(sizes) * ITEM_BYTES[kind]:
        raise ValueError(f"a piece of {name} does not fit its shape {list(shape)} or its bytes")
    return TablePiece(offsets, sizes, file, start, length)


def _numbers(values: object, place: str) -> Numbers:
    return tuple(whole(value, place, 0, LONGEST_DIMENSION) for value in sequence(values, place, MOST_DIMENSIONS))


def tiles(shape: Numbers, boxes: Iterable[tuple[Numbers, Numbers]]) -> bool:
    """True if boxes (offsets, sizes) cover a shape as a grid, each element once.

    Tensors are sharded as grids. A grid is known by its edges: in each dimension the intervals follow one another from
    0 to the end, and there are as many distinct boxes as crossings of intervals. Boxes without an element do not count.
    """
    filled = [box for box in boxes if math.prod(box[1])]
    if not math.prod(shape):
        return not filled
    edges: list[set[tuple[int, int]]] = [set() for _ in shape]
    for offsets, sizes in filled:
        for edge, interval in zip(edges, zip(offsets, sizes, strict=True), strict=True):
            edge.add(interval)
    for edge, limit in zip(edges, shape, strict=True):
        end = 0
        for offset, size in sorted(edge):
            if offset != end:
                return False
            end += size
        if end != limit:
            return False
    return len(filled) == len({offsets for offsets, _ in filled}) == math.prod(map(len, edges))

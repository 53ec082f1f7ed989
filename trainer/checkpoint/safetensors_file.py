"""Reader of safetensors files; nothing in the header is used before it is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from everstep.checked_json import mapping, parse, sequence, shown, text, whole
from everstep.trainer.checkpoint.tensor_table import LONGEST_DIMENSION, LONGEST_TENSOR_NAME, MOST_DIMENSIONS

LARGEST_HEADER = 100_000_000
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: bytes [start, end)."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        with self.file.open("rb") as file:
            file.seek(self.start)
            data = bytearray(file.read(self.end - self.start))
        if len(data) != self.end - self.start:
            raise ValueError(f"{self.file.name} ends within a tensor")
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Raises:
        ValueError: the header is damaged, or a tensor does not lie in the file, or on another one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{path.name} is no safetensors file: its header has {length} bytes, the file {size}")
        header = mapping(parse(file.read(length)), f"the header of {path.name}")
    found = {
        text(name, "the name of a tensor", LONGEST_TENSOR_NAME): _tensor(path, name, entry, 8 + length, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = 0
    for name, tensor in sorted(found.items(), key=lambda pair: (pair[1].start, pair[1].end)):
        if tensor.start < end:
            raise ValueError(f"{path.name}: {shown(name)} lies on another tensor")
        end = tensor.end
    return found


def _tensor(path: Path, name: str, described: object, data: int, size: int) -> StoredTensor:
    place = f"{path.name}: {shown(name)}"
    entry = mapping(described, place)
    kind, offsets = entry.get("dtype"), sequence(entry.get("data_offsets"), f"{place}: data_offsets", 2)
    if type(kind) is not str or kind not in DTYPES:
        raise ValueError(f"{place} has the type {shown(kind)}, which is none of {', '.join(DTYPES)}")
    shape = tuple(
        whole(each, f"{place}: its shape", 0, LONGEST_DIMENSION)
        for each in sequence(entry.get("shape"), f"{place}: its shape", MOST_DIMENSIONS)
    )
    if len(offsets) != 2:
        raise ValueError(f"{place} has {len(offsets)} offsets, not 2")
    start = whole(offsets[0], f"{place}: its start", 0, size - data)
    end = whole(offsets[1], f"{place}: its end", start, size - data)
    if end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{place} has {end - start} bytes, which do not make up its shape {list(shape)}")
    return StoredTensor(path, DTYPES[kind], shape, data + start, data + end)

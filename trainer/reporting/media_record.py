"""Records that are no numbers, made of what a user gives: texts, pictures, tables, histograms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from everstep.errors import ConfigError
from everstep.trainer.reporting.png import png

LONGEST_NAME = 128
MOST_VALUES = 1 << 20
"""Values of a histogram; of more, evenly spaced ones are taken."""
Record = Mapping[str, Any]
Pixels = NDArray[np.uint8]


@runtime_checkable
class MediaSink(Protocol):
    """A sink that shows texts, pictures, tables and histograms too.

    A record has kind ("media"), type, name, step and time, and by type: text; png (the file's bytes), caption, height
    and width; columns and rows; edges, counts and nonfinite.
    """

    def media(self, record: Record) -> None: ...


@dataclass(frozen=True)
class Media:
    """A record, and the pixels of its picture, which are encoded by the first thread that needs the file."""

    record: Record
    pixels: Pixels | None = None

    @cached_property
    def size(self) -> int:
        """Bytes in memory, about."""
        return self.pixels.nbytes if self.pixels is not None else len(self.line)

    @cached_property
    def line(self) -> str:
        return json.dumps(self.record)

    @cached_property
    def png(self) -> bytes:
        return b"" if self.pixels is None else png(self.pixels)

    def shown(self) -> Record:
        """Return the record for a sink."""
        return {**self.record, "png": self.png} if self.pixels is not None else self.record


def checked_name(call: str, name: object) -> str:
    """Return a name that a file, W&B and TensorBoard accept."""
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise ConfigError(f"{call}({name!r}): a name is 1 to {LONGEST_NAME} printable characters")
    return name


def pixels_of(name: str, image: object) -> Pixels:
    """Return a copy of a picture as (height, width) or (height, width, 3).

    Raises:
        ConfigError: it is of another type or shape.
    """
    _check_whole("log_image", name, image)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise ConfigError(
            f"log_image({name!r}): the picture is {array.dtype}, it must be uint8; of numbers in [0, 1] give "
            "(image * 255).to(torch.uint8)"
        )
    if array.ndim == 3 and shape[2] not in (1, 3) and shape[0] in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ConfigError(
            f"log_image({name!r}): a picture of shape {shape}; give one of (H, W), (H, W, 3) or (3, H, W); of a batch, "
            "one by one or side by side"
        )
    return np.array(array, order="C")


def _check_whole(call: str, name: str, value: object) -> None:
    """Refuse a tensor that FSDP has sharded: rank 0 alone cannot gather it."""
    if hasattr(value, "full_tensor"):
        raise ConfigError(f"{call}({name!r}): the tensor is sharded; give value.full_tensor(), called on all processes")


def histogram_of(name: str, values: object, bins: int) -> dict[str, Any]:
    """Return edges and counts of the finite values, and the number of the others."""
    _check_whole("log_histogram", name, values)
    if isinstance(values, torch.Tensor):
        flat = values.detach().reshape(-1)
        flat = flat[:: max(1, -(-flat.numel() // MOST_VALUES))]
        array = flat.double().cpu().numpy()
    else:
        array = np.asarray(values).reshape(-1)
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"log_histogram({name!r}): {array.dtype} values; give numbers")
        array = array[:: max(1, -(-array.size // MOST_VALUES))].astype(np.float64)
    if not 1 <= bins <= 512:
        raise ConfigError(f"log_histogram({name!r}): bins={bins} must be in [1, 512]")
    finite = array[np.isfinite(array)]
    counts, edges = np.histogram(finite, bins) if finite.size else (np.zeros(1, int), np.array([0.0, 1.0]))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "nonfinite": int(array.size - finite.size)}


def table_of(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    heads, cells = [str(column) for column in columns], [[_cell(value) for value in row] for row in rows]
    for number, row in enumerate(cells):
        if len(row) != len(heads):
            raise ConfigError(f"log_table({name!r}): row {number} has {len(row)} cells for {len(heads)} columns")
    return {"columns": heads, "rows": cells}


def _cell(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.generic | np.ndarray) and np.prod(value.shape) == 1:
        value = value.item()
    return value if isinstance(value, bool | int | float | str | None) else str(value)

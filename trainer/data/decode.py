"""Decoders from a column of bytes to tensors, for data that is stored compressed; batch by batch.

Each is a pure function of the batch. Samples that do not decode are reported all at once, by row (`BadSamples`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everstep.dataset.image_decode import FORMATS, MAX_PIXELS, MOST_PIXELS, pillow, upright
from everstep.errors import ConfigError, DataError
from everstep.trainer.data.columns import BadSamples, Ragged
from everstep.trainer.data.randomness import draws, draws_nothing

Columns = Mapping[str, Tensor | Ragged]
"""Columns that the loader gathered; the classes here are `everstep.trainer.data.dataset.Decode`."""

CHANNELS = {"RGB": 3, "L": 1}
DTYPES = {"float32": torch.float32, "uint8": torch.uint8}


class Each:
    """Apply a decoder of one sample, `function(bytes) -> Tensor`, to every sample of a column.

    Results of one shape are stacked; one-dimensional ones of different lengths become a ragged column. `function`
    should raise for a sample that it cannot decode: the text of the exception becomes the reason.
    """

    def __init__(self, function: Callable[[bytes], Tensor], column: str) -> None:
        self.function, self.column = function, column

    @property
    def draws(self) -> bool:
        return draws(self.function)

    def __call__(self, batch: Columns) -> dict[str, Tensor | Ragged]:
        """Return the batch with `column` decoded."""
        return {**batch, self.column: _joined(self.column, decode_each(batch, self.column, self.function))}


@draws_nothing
class Images:
    """Decode still images to [n, channels, height, width], oriented by their EXIF tag.

    The formats are those that `prepare` accepts.

    Args:
        column: name of the column with the files' bytes.
        size: [height, width] to resize to (bilinear, antialiased); None if all images have one size.
        mode: RGB (3 channels) or L (1, luminance); other images are converted to it.
        dtype: float32, scaled to 0 … 1, or uint8 as stored.
        max_pixels: width × height of the largest image that is decoded; a larger one counts as a bad sample.
    """

    def __init__(
        self,
        column: str = "image",
        size: Sequence[int] | None = None,
        mode: str = "RGB",
        dtype: str = "float32",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigError(f"data.decode.size={list(size)} must be [height, width] of 1 pixel or more, or null")
        for key, value, known in (("mode", mode, CHANNELS), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise ConfigError(f"data.decode.{key}={value!r} must be one of {', '.join(known)}")
        if not 1 <= max_pixels <= MOST_PIXELS:
            raise ConfigError(f"data.decode.max_pixels={max_pixels} must be from 1 to {MOST_PIXELS} (Pillow's limit)")
        pillow()
        self.max_pixels = max_pixels
        self.column, self.mode, self.dtype = column, mode, dtype
        self.size = None if size is None else (int(size[0]), int(size[1]))

    def __call__(self, batch: Columns) -> dict[str, Tensor | Ragged]:
        """Return the batch with `column` decoded; the bytes are not kept."""
        images = decode_each(batch, self.column, self._decode)
        shapes = {(image.shape[1], image.shape[2]) for image in images}
        if len(shapes) > 1:
            listed = " and ".join(f"{height} × {width}" for height, width in sorted(shapes)[:2])
            raise DataError(f"column {self.column!r} has images of {listed} pixels in one batch; set data.decode.size")
        stacked = torch.stack(images) if images else torch.empty(0, CHANNELS[self.mode], *(self.size or (0, 0)))
        stacked = stacked.to(DTYPES[self.dtype])
        return {**batch, self.column: stacked.div_(255) if self.dtype == "float32" else stacked}

    def _decode(self, content: bytes) -> Tensor:
        try:
            image = upright(content, self.max_pixels).convert(self.mode)
        except pillow().UnidentifiedImageError:
            raise ValueError(
                f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
            ) from None  # Pillow's own text contains an address
        if self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], pillow().Resampling.BILINEAR)
        pixels = np.array(image)
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], CHANNELS[self.mode])).permute(2, 0, 1)


def decode_each(batch: Columns, column: str, function: Callable[[bytes], Tensor]) -> list[Tensor]:
    """Apply `function` to each sample's bytes, in order.

    Raises:
        BadSamples: `function` raised for the rows that it names.
    """
    samples = batch.get(column)
    if not isinstance(samples, Ragged) or samples.values.dtype != torch.uint8:
        raise DataError(f"data.decode.column={column!r} must be a column of bytes; the dataset has {_described(batch)}")
    decoded: list[Tensor] = []
    errors: dict[int, str] = {}
    for row in range(len(samples)):
        try:
            decoded.append(function(samples.bytes(row)))
        except (MemoryError, ConfigError):
            # Not the sample's fault: leaving it out would make this run differ from one with more memory.
            raise
        except Exception as error:
            errors[row] = " ".join(f"{type(error).__name__}: {error}".split())
    if errors:
        raise BadSamples(errors)
    return decoded


def _joined(column: str, decoded: list[Tensor]) -> Tensor | Ragged:
    shapes = {sample.shape for sample in decoded}
    if len(shapes) == 1:
        return torch.stack(decoded)
    if all(sample.ndim == 1 for sample in decoded):
        return Ragged.of(decoded)
    listed = " and ".join(str([*shape]) for shape in sorted(shapes)[:2])
    raise DataError(
        f"data.decode gives column {column!r} samples of shapes {listed}; make them one, or one-dimensional"
    )


def _described(batch: Columns) -> str:
    def kind(column: Tensor | Ragged) -> Any:
        return "ragged " + str(column.values.dtype) if isinstance(column, Ragged) else column.dtype

    return ", ".join(f"{name} ({kind(column)})" for name, column in batch.items())

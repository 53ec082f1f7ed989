"""Images: the same rules of valid images when a dataset is prepared and when it is decoded."""

from __future__ import annotations

import importlib
import re
from io import BytesIO
from types import ModuleType
from typing import Any

from everstep.errors import ConfigError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 25_000_000
"""Largest image to decode unless `data.decode.max_pixels` differs: 75 MB of RGB, 300 MB as float32.

A PNG of 160 kB can hold 169 million pixels; one such sample would take a gigabyte on each rank.
"""
MOST_PIXELS = 178_956_970
"""Largest image that Pillow opens."""
_DEEP = re.compile(r";16[BLN]")
"""Pillow's names of modes with 16 bits per channel, of which it would drop the lower bits."""


class UnfitImageError(ValueError):
    """An image that cannot be decoded without loss; the text does not reveal its content."""


def upright(content: bytes, most: int = MOST_PIXELS) -> Any:
    """Return the still image in these bytes, loaded as a whole and oriented by its EXIF data.

    An image of more than `most` pixels is refused before any is decoded.

    Raises:
        UnfitImageError: the image cannot be decoded without loss. For other bytes, any error of Pillow.
    """
    image = pillow().open(BytesIO(content), formats=FORMATS)
    if image.width * image.height > most:
        raise UnfitImageError(f"{image.width} × {image.height} pixels are more than data.decode.max_pixels={most}")
    # Phones and cameras store MPO, which is a JPEG with further views of it.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise UnfitImageError(f"{image.n_frames} frames; only still images are decoded")
    if image.mode.startswith(("I", "F")) or any(_is_deep(tile.args) for tile in image.tile):
        raise UnfitImageError(f"{image.mode} pixels; only images of 8 bits a channel are decoded")
    image.load()
    return pillow("PIL.ImageOps").exif_transpose(image)


def _is_deep(arguments: Any) -> bool:
    name, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    highest = more[0] if len(more) == 1 and isinstance(more[0], int) else 255  # the form in which PPM reports it
    return _DEEP.search(str(name)) is not None or highest > 255


def undecodable(content: bytes) -> str:
    """Return the reason why these bytes are no valid image; empty if they are one."""
    try:
        with pillow().open(BytesIO(content), formats=FORMATS) as image:
            image.verify()  # checks checksums, if the format has them
        upright(content)
    except UnfitImageError as error:
        return f"cannot be decoded: {error}"
    except Exception as error:  # Pillow's decoders may raise any exception
        return f"cannot be decoded ({type(error).__name__})"
    return ""


def pillow(module: str = "PIL.Image") -> ModuleType:
    """Return the module.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"decoding images needs {error.name}: pip install 'everstep[images]'") from error

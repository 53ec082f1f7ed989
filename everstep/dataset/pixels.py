"""What counts as an image: the same rules when a dataset is prepared and when it is decoded."""

from __future__ import annotations

import importlib
import re
from io import BytesIO
from types import ModuleType
from typing import Any

from everstep.errors import ConfigError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_DEEP = re.compile(r";16[BLN]")
"""How Pillow names pixels of 16 bits a channel, of which it would drop the lower ones."""


class UnfitImageError(ValueError):
    """An image, but not one that is decoded without loss; the text tells nothing of its content."""


def upright(content: bytes) -> Any:
    """The still image in these bytes, loaded as a whole and turned as its EXIF data says.

    UnfitImageError, or any error of Pillow's, for other bytes.
    """
    image = pillow().open(BytesIO(content), formats=FORMATS)
    # What phones and cameras store as MPO is a JPEG with further views of it.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise UnfitImageError(f"{image.n_frames} frames; only still images are decoded")
    if image.mode.startswith(("I", "F")) or any(_is_deep(tile.args) for tile in image.tile):
        raise UnfitImageError(f"{image.mode} pixels; only images of 8 bits a channel are decoded")
    image.load()
    return pillow("PIL.ImageOps").exif_transpose(image)


def _is_deep(arguments: Any) -> bool:
    name, *more = arguments if isinstance(arguments, tuple) else (arguments,)
    highest = more[0] if len(more) == 1 and isinstance(more[0], int) else 255  # as PPM tells it
    return _DEEP.search(str(name)) is not None or highest > 255


def undecodable(content: bytes) -> str:
    """Why these bytes are no image that trains; empty when they are one."""
    try:
        with pillow().open(BytesIO(content), formats=FORMATS) as image:
            image.verify()  # checksums, where the format has them
        upright(content)
    except UnfitImageError as error:
        return f"cannot be decoded: {error}"
    except Exception as error:  # Pillow's decoders raise what they like
        return f"cannot be decoded ({type(error).__name__})"
    return ""


def pillow(module: str = "PIL.Image") -> ModuleType:
    """The module; ConfigError where Pillow is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"decoding images needs {error.name}: pip install 'everstep[images]'") from error

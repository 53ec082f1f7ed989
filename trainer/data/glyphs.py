"""Images and texts without a download: letters in the fonts of matplotlib, and their Unicode names."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.errors import DataError
from everstep.trainer.data.dataset import ArrayDataset, Splits
from everstep.trainer.data.sklearn_datasets import shifted, split_ids

FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif")
WORDS = 10
"""Words of a name that are kept; few names have more."""
FONT_PIXELS = 22


def glyphs(held_out: float = 0.12, split_seed: int = 0, size: int = 32, last_code: int = 0x1FFF) -> Splits:
    """Return about 10,000 pairs of a letter's picture and its Unicode name, in five faces, up to U+1FFF.

    Columns: `image` float32 [n, 1, size, size] in [0, 1]; `words` int64 [n, 10], numbers of the name's words from 1,
    and 0 for padding; `name` int64 [n], equal for pictures of one name. Names are held out in all faces. Words that no
    training name has are 0. Training pictures are shifted by up to one pixel, anew in each epoch.

    Args:
        held_out: share of the names.
        split_seed: chooses them.
        size: width and height of a picture in pixels.
        last_code: characters with higher code points are left out.

    Raises:
        DataError: a package is not installed.
    """
    pictures, codes = _drawn(size, last_code)
    names, owners = np.unique([unicodedata.name(chr(code)) for code in codes], return_inverse=True)
    known, unseen = split_ids(len(names), held_out, split_seed)
    words = _numbered([name_words(str(name)) for name in names], known)
    columns: dict[str, NDArray[Any]] = {
        "image": pictures[:, None],
        "words": words[owners],
        "name": owners.astype(np.int64),
    }
    train, validation = (
        ArrayDataset({column: array[np.isin(owners, part)] for column, array in columns.items()})
        for part in (known, unseen)
    )
    return Splits(train, validation, shifted)


def name_words(name: str) -> list[str]:
    """Return the words of a character's name."""
    return re.split("[ -]+", name)


def _numbered(names: Sequence[Sequence[str]], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of words, int64 [names, WORDS]; words count from 1 in the order of the alphabet."""
    found = sorted({word for row in known for word in names[row]})
    numbers = {word: number for number, word in enumerate(found, start=1)}
    table = np.zeros((len(names), WORDS), np.int64)
    for row, name in enumerate(names):
        kept = [numbers.get(word, 0) for word in name[:WORDS]]
        table[row, : len(kept)] = kept
    return table


def _drawn(size: int, last_code: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return pictures float32 [n, size, size] of the letters that have a name and ink, and their codes."""
    try:
        from fontTools.ttLib import TTFont
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise _missing(error.name or "fonttools") from error
    pictures, codes = [], []
    for face in FACES:
        file = _fonts() / f"{face}.ttf"
        font = ImageFont.truetype(file, FONT_PIXELS * size // 32, layout_engine=ImageFont.Layout.BASIC)
        with TTFont(file, lazy=True) as table:
            there = sorted(code for code in table.getBestCmap() if code <= last_code)
        for code in there:
            if not chr(code).isalpha() or unicodedata.name(chr(code), None) is None:
                continue
            picture = Image.new("L", (size, size))
            ImageDraw.Draw(picture).text((size // 2, size // 2), chr(code), fill=255, font=font, anchor="mm")
            if picture.getbbox() is not None:
                pictures.append(np.asarray(picture, np.float32) / 255)
                codes.append(code)
    return np.stack(pictures), np.array(codes, np.int64)


def _fonts() -> Path:
    """Return the folder of matplotlib's fonts, without importing it."""
    found: Any = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise _missing("matplotlib")
    return Path(found.origin).parent / "mpl-data/fonts/ttf"


def _missing(package: str) -> DataError:
    return DataError(f"data.glyphs needs {package}: pip install 'everstep[glyphs]'")

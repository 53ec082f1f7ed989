"""Images: what `prepare` takes decodes in training to the pixels that were stored; all else is named by its file."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from everstep.dataset.readers.whole_files import IMAGES
from everstep.errors import ConfigError
from everstep.trainer.data.columns import Ragged
from everstep.trainer.data.decode import Images
from support.preparation import outcome

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
PLUGINS = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}


def encoded(format: str, **options: Any) -> bytes:
    file = BytesIO()
    mode = "P" if format == "GIF" else "RGB"
    Image.fromarray(PIXELS).convert(mode).save(file, format, **options)
    return file.getvalue()


def photos(folder: Path, **files: bytes) -> Path:
    (folder / "cat").mkdir(parents=True)
    for name, content in files.items():
        (folder / "cat" / name.replace("_", ".")).write_bytes(content)
    return folder


def decoded(*files: bytes) -> np.ndarray:
    column = Ragged.of([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])
    image = Images(dtype="uint8")({"image": column})["image"]
    assert isinstance(image, torch.Tensor)
    return image.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("suffix", IMAGES)
@pytest.mark.parametrize("upper", [False, True])
def test_every_kind_of_image_that_is_prepared_decodes(tmp_path: Path, suffix: str, upper: bool) -> None:
    content = encoded(PLUGINS.get(suffix, suffix[1:].upper()))
    name = f"x{suffix.upper() if upper else suffix}"
    found = outcome(photos(tmp_path / "src", **{name.replace(".", "_"): content}))
    assert found.places == []
    with Image.open(BytesIO(content)) as image:
        assert np.array_equal(decoded(found.rows[0]["image"])[0], np.array(image.convert("RGB")))


WHOLE = [
    encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG"), encoded("WEBP"), encoded("WEBP", lossless=True),
    encoded("GIF"), encoded("BMP"), encoded("TIFF"), encoded("TIFF", compression="tiff_lzw"), encoded("PPM"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200)
@given(st.sampled_from(WHOLE), st.floats(0, 1))
def test_an_image_cut_anywhere_has_the_same_pixels_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, part: float
) -> None:
    cut = whole[: int(len(whole) * part)]
    found = outcome(photos(tmp_path_factory.mktemp("cut") / "src", whole_png=whole, cut_png=cut))
    assert len(found.rows) + len(found.places) == 2
    assert all(np.array_equal(decoded(row["image"]), decoded(whole)) for row in found.rows)
    assert all(place.endswith("cut.png") for place in found.places)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_as_its_exif_data_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded("PNG", exif=exif)
    with Image.open(BytesIO(turned)) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(decoded(turned)[0], upright)
    assert np.array_equal(upright, PIXELS) == (orientation == 1)


def png_of_16_bits(channels: int) -> bytes:
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 2, 2, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = (b"\0" + bytes(range(4 * channels))) * 2
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")


def frames(format: str) -> bytes:
    file = BytesIO()
    several = [Image.fromarray(np.full((8, 8, 3), 50 * number, np.uint8)) for number in range(3)]
    several[0].save(file, format, save_all=True, append_images=several[1:])
    return file.getvalue()


LOSSY = {
    **{f"{channels} of 16 bits": png_of_16_bits(channels) for channels in (1, 2, 3, 4)},
    "ppm of 16 bits": b"P6\n2 2\n65535\n" + bytes(24), "pgm of 16 bits": b"P5\n2 2\n1000\n" + bytes(8),
    **{f"frames of {format}": frames(format) for format in ("GIF", "WEBP", "PNG", "TIFF")},
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSY)
def test_what_would_lose_pixels_is_named_when_it_is_prepared(tmp_path: Path, kind: str) -> None:
    found = outcome(photos(tmp_path / "src", good_png=encoded("PNG"), lossy_png=LOSSY[kind]))
    assert found.places == [f"{tmp_path}/src/cat/lossy.png"]
    assert ("16" in kind) == ("8 bits a channel" in found.reasons[0])
    assert ("frames" in kind) == ("3 frames; only still images" in found.reasons[0])


def test_a_photo_with_further_views_is_its_first(tmp_path: Path) -> None:
    content = frames("MPO")
    assert outcome(photos(tmp_path / "src", x_jpg=content)).places == []
    assert (decoded(content) == 0).all()


def test_without_pillow_images_are_not_taken_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "src", x_png=encoded("PNG"))
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"pip install 'everstep\[images\]'"):
        outcome(tmp_path / "src")

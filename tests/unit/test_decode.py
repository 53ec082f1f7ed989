"""Decoding: the pixels that were stored, and every bad sample of a batch named at once."""

from __future__ import annotations

import importlib
import pickle
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from everstep.config import BadSample
from everstep.errors import ConfigError, DataError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.columns import BadSamples, Ragged
from everstep.trainer.data.decode import Each, Images
from everstep.trainer.data.fetcher import Fetcher, MicrobatchRequest
from support.shard_datasets import write_dataset


def pixels(height: int = 5, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def column(*files: bytes) -> Ragged:
    return Ragged.of([torch.frombuffer(bytearray(file or b"\0"), dtype=torch.uint8)[: len(file)] for file in files])


def test_a_png_gives_back_the_pixels_that_were_stored_channels_first() -> None:
    stored = [pixels(seed=seed) for seed in range(3)]
    label = torch.arange(3)
    batch = Images(dtype="uint8")({"image": column(*map(png, stored)), "label": label})
    image = batch["image"]
    assert isinstance(image, torch.Tensor)
    assert image.is_contiguous()
    assert np.array_equal(image.permute(0, 2, 3, 1).numpy(), np.stack(stored))
    assert batch["label"] is label


def test_floats_are_the_same_pixels_from_zero_to_one() -> None:
    files = {"image": column(png(pixels()), png(pixels(seed=1)))}
    whole, scaled = Images(dtype="uint8")(files)["image"], Images()(files)["image"]
    assert isinstance(scaled, torch.Tensor)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled * 255, whole.float())  # type: ignore[union-attr]


def test_images_of_many_sizes_formats_and_modes_become_one_tensor_of_the_size_asked() -> None:
    grey, palette = pixels(9, 4)[:, :, 0], BytesIO()
    Image.fromarray(pixels()).convert("P").save(palette, "PNG")
    files = column(png(pixels(20, 30)), png(pixels(8, 6), "JPEG"), png(grey), palette.getvalue())
    for mode, channels in (("RGB", 3), ("L", 1)):
        image = Images(size=[8, 6], mode=mode)({"image": files})["image"]
        assert image.shape == (4, channels, 8, 6)  # type: ignore[union-attr]


def test_images_of_two_sizes_without_a_size_name_both_and_the_key() -> None:
    with pytest.raises(DataError, match=r"'image' has images of 5 × 7 and 6 × 7 pixels .*data\.decode\.size"):
        Images()({"image": column(png(pixels()), png(pixels(6)))})


def deep_png() -> bytes:
    file = BytesIO()
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG that says it has 10^10 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT" + bytes(1000)


def test_all_bad_rows_of_a_batch_are_told_at_once_with_their_reasons() -> None:
    good = png(pixels(64, 64))
    files = column(b"", good, good[:-200], b"GIF89a of another kind", good, deep_png(), bomb())
    with pytest.raises(BadSamples) as caught:
        Images()({"image": files})
    errors = caught.value.errors
    assert list(errors) == [0, 2, 3, 5, 6]
    assert errors[0] == errors[3] == "ValueError: is no PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM"
    assert "truncated" in errors[2]
    assert "8 bits" in errors[5]
    assert "DecompressionBomb" in errors[6]
    assert str(caught.value).startswith("5 of the batch's samples cannot be used: row 0: ")
    assert str(caught.value).endswith("; and 2 more")
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_no_bytes_at_all_escape_as_anything_but_a_bad_sample(noise: bytes, cut: int) -> None:
    good = png(pixels())
    for file in (noise, good[:cut] + noise + good[cut + len(noise) :]):
        bad: list[int] = []
        image = torch.empty(2, 3, 4, 4)
        try:
            image = Images(size=(4, 4))({"image": column(good, file)})["image"]  # type: ignore[assignment]
        except BadSamples as error:
            bad += error.errors
        assert bad in ([], [1])
        assert image.shape == (2, 3, 4, 4)


def test_bad_samples_keep_their_rows_out_of_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(BadSamples({4: "why", 1: "because"})))
    assert error.errors == {1: "because", 4: "why"}
    assert isinstance(error, DataError)


def test_a_function_of_one_sample_serves_a_batch() -> None:
    batch = {"x": column(b"ab", b"cdef")}
    lengths = Each(lambda content: torch.tensor([len(content)]), "x")(batch)["x"]
    assert lengths.tolist() == [[2], [4]]  # type: ignore[union-attr]
    doubled = Each(lambda content: torch.tensor([*content, *content]), "x")(batch)["x"]
    assert isinstance(doubled, Ragged)
    assert doubled[1].tolist() == [*b"cdefcdef"]
    with pytest.raises(DataError, match=r"column 'x' samples of shapes \[2, 1\] and \[4, 1\]"):
        Each(lambda content: torch.zeros(len(content), 1), "x")(batch)


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("error", [MemoryError(), ConfigError("data.decode.size")])
def test_what_is_not_the_samples_fault_is_not_laid_at_its_door(error: Exception) -> None:
    with pytest.raises(type(error)):
        Each(lambda _: _raise(error), "x")({"x": column(b"ab")})


def test_a_column_that_holds_no_bytes_is_named_with_what_there_is() -> None:
    with pytest.raises(
        DataError, match=r"data\.decode\.column='image' .* x \(torch\.int64\), y \(ragged torch\.int64\)"
    ):
        Images()({"x": torch.arange(2), "y": Ragged.of([torch.arange(2)])})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": [0, 4]}, r"data\.decode\.size=\[0, 4\]"),
        ({"size": [4]}, r"data\.decode\.size=\[4\]"),
        ({"mode": "CMYK"}, r"data\.decode\.mode='CMYK' must be one of RGB, L"),
        ({"dtype": "float16"}, r"data\.decode\.dtype='float16' must be one of float32, uint8"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Images(**settings)


def test_without_pillow_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="PIL")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"decoding images needs PIL: pip install 'everstep\[images\]'"):
        Images()


def test_a_run_leaves_out_the_images_that_do_not_decode_and_names_them_where_it_stops(tmp_path: Path) -> None:
    files = [png(pixels(seed=seed)) for seed in range(6)]
    files[1] = files[4] = b"no image"
    write_dataset(tmp_path / "set", [2, 4], {"image": files, "id": np.arange(6)})
    data = ArrowDataset(str(tmp_path / "set"))
    request = MicrobatchRequest(np.array([4, 0, 5, 1]), np.zeros(4, np.int64), 1)
    kept = Fetcher(data, 0, Images(dtype="uint8"), on_bad=BadSample.skip)(request)
    assert kept.ids.tolist() == kept.batch["id"].tolist() == [0, 5]
    assert np.array_equal(kept.batch["image"][1].permute(1, 2, 0).numpy(), pixels(seed=5))
    with pytest.raises(DataError, match=r"shard-1.arrow, row 2: ValueError: is no PNG, JPEG, WEBP"):
        Fetcher(data, 0, Images())(request)

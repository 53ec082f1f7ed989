"""A few bytes of a source or a sample that would unpack to more than any memory are refused before they do."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from everstep.dataset.image_decode import MAX_PIXELS
from everstep.dataset.readers import json_array, npy, tar, text, webdataset
from everstep.errors import ConfigError, DataError
from everstep.trainer.data.columns import BadSamples, Ragged
from everstep.trainer.data.decode import Images
from support.preparation import outcome

MIB = 1 << 20


def column(*files: bytes) -> Ragged:
    return Ragged.of([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])


def blank(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_an_image_of_too_many_pixels_is_refused_before_any_is_decoded() -> None:
    bomb = blank(8000, 4000)
    assert len(bomb) < 64 << 10
    tracemalloc.start()
    with pytest.raises(BadSamples, match=rf"8000 × 4000 pixels are more than data\.decode\.max_pixels={MAX_PIXELS}"):
        Images()({"image": column(bomb)})
    assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    tracemalloc.stop()


def test_the_limit_of_pixels_is_a_key_of_the_decoder() -> None:
    assert Images(max_pixels=12)({"image": column(blank(4, 3))})["image"].shape == (1, 3, 3, 4)
    with pytest.raises(BadSamples, match="max_pixels=11"):
        Images(max_pixels=11)({"image": column(blank(4, 3))})
    with pytest.raises(ConfigError, match=r"data\.decode\.max_pixels=0 must be"):
        Images(max_pixels=0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """All limits at a size that a test can exceed."""
    for module in (tar, text, json_array, webdataset):
        monkeypatch.setattr(module, "LONGEST_BYTES", MIB)
    monkeypatch.setattr(npy, "LARGEST_ARCHIVE", MIB)
    return MIB


def packed(path: Path, members: list[tuple[str, int]]) -> Path:
    """Write a compressed archive of zeros."""
    with tarfile.open(path, "w:gz") as archive:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    return path


def test_a_file_of_an_archive_that_is_too_large_is_a_bad_record(tmp_path: Path, small: int) -> None:
    source = packed(tmp_path / "x.tar.gz", [("a.bin", 10), ("b.bin", 3 * small), ("c.bin", 10)])
    made = outcome(source, format="webdataset")
    assert [row["key"] for row in made.rows] == ["a", "c"]
    assert made.reasons == [f"is {3 * small} bytes, over the limit of {small}"]


def test_a_sample_of_many_files_is_bounded_as_a_whole(tmp_path: Path, small: int) -> None:
    source = packed(tmp_path / "x.tar.gz", [("a.x", 9), *((f"b.x{n}", small // 2) for n in range(4)), ("c.x", 9)])
    made = outcome(source, format="webdataset", columns=["key", "x"])
    assert [row["key"] for row in made.rows] == ["a", "c"]
    assert f"is larger than {small} bytes, the limit" in made.reasons


def test_a_header_of_an_archive_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1 << 32
    (tmp_path / "x.tar").write_bytes(tarfile.TarInfo("a.bin").tobuf() + header.tobuf() + bytes(4096))
    made = outcome(tmp_path / "x.tar", format="webdataset")
    assert [row["key"] for row in made.rows] == ["a"]
    assert any(f"a header of {1 << 32} bytes" in reason for reason in made.reasons)


@pytest.mark.parametrize(
    ("name", "kind", "head"), [("x.txt.gz", "text", b"ok\n"), ("x.jsonl.gz", "jsonl", b'{"a": 1}\n')]
)
def test_a_line_without_end_is_bounded(tmp_path: Path, small: int, name: str, kind: str, head: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(head * (9 * MIB // len(head)) + b" " * (40 * small)))
    made = outcome(tmp_path / name, format=kind)
    assert made.table.num_rows > 0
    assert any(f"has a line of more than {small} bytes" in reason for reason in made.reasons)


def test_a_value_without_end_is_bounded(tmp_path: Path, small: int) -> None:
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b'[{"a": 1}, {"a": "' + b"x" * (40 * small)))
    made = outcome(tmp_path / "x.json.gz", format="json")
    assert made.table.num_rows == 1
    assert any(f"has a value of more than {small} characters" in reason for reason in made.reasons)


def test_an_archive_of_arrays_is_bounded(tmp_path: Path, small: int) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(small, np.uint8))
    with pytest.raises(DataError, match=rf"x\.npz unpacks to \d+ bytes \(limit {small}\)"):
        outcome(tmp_path / "x.npz", format="npy")

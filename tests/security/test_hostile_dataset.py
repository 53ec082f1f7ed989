"""A dataset from elsewhere: its offsets, names and numbers lead to no byte that is not its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.dataset.index import Column, ShardIndex
from everstep.dataset.verify import verify
from everstep.errors import DataError
from everstep.storage import open_storage
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from everstep.trainer.data.columns import Ragged
from support.hostile_sets import edit_index, index_of, ragged_set
from support.shard_datasets import numbered, write_dataset

FAR = 1 << 45
OFFSETS = {
    "negative": [0, 16, -(4096**2), -(4096**2) + 64],
    "far below": [0, 16, -FAR, 16 - FAR],
    "beyond": [0, 16, 64, 64 + 4096],
    "far beyond": [0, 16, 0, FAR],
    "decreasing": [0, 16, 48, 32],
    "the least and the greatest": [0, 16, 2**63 - 1, -(2**63)],
    "so far apart that their difference overflows": [0, 16, 2**62 + 1, -(2**62)],
}


@pytest.mark.parametrize("kind", ["bytes", "int32"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_offsets_that_lead_out_of_a_column_are_refused_with_their_place(
    tmp_path: Path, offsets: list[int], kind: str
) -> None:
    folder = ragged_set(tmp_path / "set", offsets, kind)
    data = ArrowDataset(str(folder))
    first = data.take(np.array([0]))["text"]
    assert isinstance(first, Ragged)
    assert first[0].tolist() == list(range(16))
    with pytest.raises(DataError, match=r"column 'text' of .*shard-0\.arrow, row 2: offsets -?\d+ to -?\d+ of \d+"):
        data.take(np.array([0, 2, 0]))


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
def test_verify_does_not_call_a_dataset_whole_whose_offsets_lead_out(tmp_path: Path, offsets: list[int]) -> None:
    folder = ragged_set(tmp_path / "set", offsets)
    (damage,) = verify(str(folder))
    assert "offsets of column 'text' lead out" in str(damage)
    with pytest.raises(DataError, match="offsets of column 'text' lead out"):
        ArrowDataset(str(folder), verify=True).take(np.array([0]))


def test_offsets_of_a_shard_in_a_store_are_verified_too(tmp_path: Path) -> None:
    folder = ragged_set(tmp_path / "set", OFFSETS["beyond"])
    url = f"memory://{tmp_path.name}-verified"
    for name in ("shard-0.arrow", "index.json"):
        open_storage(url).write(name, (folder / name).read_bytes())
    (damage,) = verify(url)
    assert "offsets of column 'text' lead out" in str(damage)
    data = ArrowDataset(url, cache=lambda: ShardCache(str(tmp_path / "cache"), 10**9))
    with pytest.raises(DataError, match="row 2: offsets"):
        data.take(np.array([2]))


@pytest.mark.parametrize("length", [-1, 10**6, 2**62])
def test_values_of_the_wrong_count_are_refused_before_they_are_read(tmp_path: Path, length: int) -> None:
    folder = ragged_set(tmp_path / "set", [0, 16, 32, 48], "int32")
    content = (folder / "shard-0.arrow").read_bytes()
    # The lengths of a column of lists and of its values, after that of the record batch, in the file's own header.
    fields = b"".join(number.to_bytes(8, "little") for number in (3, 0, 48, 0))
    assert content.count(fields) == 1
    changed = fields.replace((48).to_bytes(8, "little"), length.to_bytes(8, "little", signed=True))
    (folder / "shard-0.arrow").write_bytes(content.replace(fields, changed))
    index_of(folder, {"text": Column("int32", (None,))}, 3)
    with pytest.raises(DataError, match="is damaged"):
        ArrowDataset(str(folder)).take(np.array([0]))
    assert verify(str(folder))


def test_offsets_of_the_wrong_count_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder = ragged_set(tmp_path / "set", [0, 16, 32, 48])
    content = (folder / "shard-0.arrow").read_bytes()
    # The lengths of the record batch and of its only column, in the file's own header.
    for count in (4, 6, 2**40, 2**62):
        changed = content.replace((3).to_bytes(8, "little"), count.to_bytes(8, "little"))
        assert changed != content
        (folder / "shard-0.arrow").write_bytes(changed)
        index_of(folder, {"text": Column("bytes", (None,))}, 3)
        with pytest.raises(DataError, match=r"damaged|has .* rows where the index says"):
            ArrowDataset(str(folder)).take(np.array([2]))
        assert verify(str(folder))


@pytest.mark.parametrize("name", ["../private/x.arrow", "/etc/passwd", "..", ".", "", "a/b.arrow", "a\0b", "\ud800", 5])
def test_a_shard_is_a_plain_name_below_the_folder_of_its_dataset(tmp_path: Path, name: Any) -> None:
    write_dataset(tmp_path / "private", [4], numbered(4))
    write_dataset(tmp_path / "set", [4], numbered(4))
    edit_index(tmp_path / "set", lambda index: index["shards"][0].update(file=name))
    with pytest.raises(DataError, match=r"index\.json is damaged: shards\[0\]\.file is .*not the name of a file"):
        ArrowDataset(str(tmp_path / "set"))


def test_a_link_out_of_the_dataset_is_not_followed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "private", [4], numbered(4))
    write_dataset(tmp_path / "set", [4], numbered(4))
    shard, index = tmp_path / "set" / "shard-0.arrow", tmp_path / "set" / "index.json"
    shard.unlink()
    shard.symlink_to(tmp_path / "private" / "shard-0.arrow")
    with pytest.raises(DataError, match=r"shard-0\.arrow is a link out"):
        ArrowDataset(str(tmp_path / "set")).take(np.array([0]))
    assert "is a link out" in str(verify(str(tmp_path / "set"))[0])
    index.unlink()
    index.symlink_to(tmp_path / "private" / "index.json")
    with pytest.raises(DataError, match=r"index\.json is damaged: it is a link out"):
        ShardIndex.read(str(tmp_path / "set"))


def test_a_link_within_the_dataset_is_a_file_like_any_other(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4], numbered(4))
    os.rename(tmp_path / "shard-0.arrow", tmp_path / "kept")
    (tmp_path / "shard-0.arrow").symlink_to("kept")
    assert ArrowDataset(str(tmp_path)).take(np.array([3]))["id"].tolist() == [3]


NUMBERS: dict[str, Any] = {
    "rows -8": ("rows", -8),
    "rows 2^62": ("rows", 1 << 62),
    "rows 8.0": ("rows", 8.0),
    "rows true": ("rows", True),
    "rows of more than the file can hold": ("rows", 10**6),
    "bytes as text": ("bytes", "264"),
    "bytes null": ("bytes", None),
    "bytes 0": ("bytes", 0),
    "parts none": ("parts", []),
    "parts that are no digests": ("parts", ["00"]),
    "parts a number": ("parts", 3),
}


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS.keys())
def test_every_number_of_a_shard_is_typed_and_in_range(tmp_path: Path, change: tuple[str, Any]) -> None:
    write_dataset(tmp_path, [4], numbered(4))
    edit_index(tmp_path, lambda index: index["shards"][0].update([change]))
    with pytest.raises(DataError, match=rf"index\.json is damaged: shards\[0\]\.{change[0]} ") as refused:
        ArrowDataset(str(tmp_path))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "column",
    [
        {"type": "O", "shape": []},
        {"type": "int64", "shape": [-4]},
        {"type": "int64", "shape": [1 << 62, 0, 1 << 62]},
        {"type": "int64", "shape": [2.0]},
        {"type": "int64", "shape": [None, None]},
        {"type": "str", "shape": [4]},
        {"type": "int64", "shape": "ab"},
        {"type": ["int64"], "shape": []},
        {"type": "int64"},
        5,
    ],
)
def test_every_column_is_of_a_known_type_and_shape(tmp_path: Path, column: Any) -> None:
    write_dataset(tmp_path, [4], numbered(4))
    edit_index(tmp_path, lambda index: index["columns"].update(id=column))
    with pytest.raises(DataError, match=r"index\.json is damaged: columns\.'id'"):
        ArrowDataset(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "5", "null", "[" * 10**5, "{", '{"format": 2}', "9" * 5000, ""])
def test_an_index_that_is_none_is_said_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json") as refused:
        ArrowDataset(str(tmp_path))
    assert "\n" not in str(refused.value)

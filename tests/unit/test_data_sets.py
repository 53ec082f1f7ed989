"""Datasets: a batched gather, a digest that sees every bit, and errors that say what to change."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from everstep.dataset.index import ShardIndex
from everstep.dataset.shard_format import columns_of, table_of, write_shard
from everstep.errors import ConfigError, DataError
from everstep.storage import open_storage
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from everstep.trainer.data.co2_series import co2_windows
from everstep.trainer.data.columns import Ragged
from everstep.trainer.data.dataset import ArrayDataset, MapDataset, Subset
from everstep.trainer.data.sklearn_datasets import breast_cancer, digits, frame_dataset, shifted, split_ids
from everstep.trainer.data.stdlib_calls import stdlib_calls
from everstep.trainer.data.stdlib_documents import stdlib_documents
from support import shard_datasets


def write_dataset(folder: Path, shards: int = 3, rows: int = 5) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    total = shards * rows
    columns = {
        "image": np.random.default_rng(0).normal(size=(total, 2, 3)).astype(np.float32),
        "label": np.arange(total, dtype=np.int64),
        "flag": np.arange(total) % 2 == 0,
    }
    parts = [
        write_shard(
            open_storage(str(folder)),
            f"shard-{n}.arrow",
            table_of({name: array[n * rows : (n + 1) * rows] for name, array in columns.items()}),
        )
        for n in range(shards)
    ]
    ShardIndex(columns_of(table_of(columns).schema), tuple(parts)).write(str(folder))
    return columns


@pytest.mark.parametrize("shards", [1, 3])
def test_an_arrow_dataset_gathers_rows_across_shards_in_the_order_asked(tmp_path: Path, shards: int) -> None:
    columns = write_dataset(tmp_path / "set", shards)
    data = ArrowDataset(str(tmp_path / "set"))
    ids = np.random.default_rng(1).integers(0, len(data), 40)
    batch = data.take(ids)
    assert len(data) == shards * 5
    for name, array in columns.items():
        assert np.array_equal(batch[name].numpy(), array[ids])
        assert batch[name].numpy().dtype == array.dtype


def test_the_first_pieces_of_local_shards_are_gathered_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = write_dataset(tmp_path / "set")
    data = ArrowDataset(str(tmp_path / "set"))
    gathered: list[int] = []
    column = data._stored["label"]
    gather = column.gather
    monkeypatch.setattr(column, "gather", lambda places: gathered.append(len(places)) or gather(places))
    monkeypatch.setattr(data, "_row_bytes", float(1 << 20))
    ids = np.array([7, 1, 4, 0, 2])  # of two of the three shards: the dataset is not settled by them
    batches = data.take_batches(ids, [0, 2, 4, 5])
    assert not gathered
    for start, stop in ((0, 2), (2, 4), (4, 5)):
        assert next(batches)["label"].tolist() == columns["label"][ids[start:stop]].tolist()
        assert gathered[-1] == stop - start


def test_a_shard_that_is_missing_is_told_before_the_first_piece(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set")
    (tmp_path / "set/shard-1.arrow").unlink()
    with pytest.raises(DataError, match=r"shard-1\.arrow is missing"):
        ArrowDataset(str(tmp_path / "set")).take_batches(np.arange(10), [0, 5, 10])


def test_an_arrow_dataset_can_be_pickled_and_read_by_pyarrow_alone(tmp_path: Path) -> None:
    import pyarrow as pa

    write_dataset(tmp_path / "set")
    data = ArrowDataset(str(tmp_path / "set"))
    before = data.take(np.arange(4))
    after = pickle.loads(pickle.dumps(data)).take(np.arange(4))
    assert torch.equal(before["image"], after["image"])
    table = pa.ipc.open_file(str(tmp_path / "set" / "shard-0.arrow")).read_all()
    assert table.column("label").to_pylist() == [0, 1, 2, 3, 4]


def test_a_remote_dataset_is_fetched_through_the_cache_and_checked(tmp_path: Path) -> None:
    import fsspec

    columns = write_dataset(tmp_path / "set")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "set"), "/sets/one", recursive=True)
    cache = tmp_path / "cache"
    data = ArrowDataset("memory://sets/one", cache=lambda: ShardCache(str(cache), 10**9))
    assert np.array_equal(data.take(np.array([14, 0]))["label"].numpy(), columns["label"][[14, 0]])
    assert len(list(cache.rglob("*.arrow"))) == 2
    damaged = bytearray(store.cat("/sets/one/shard-1.arrow"))
    damaged[-200] ^= 1
    store.pipe("/sets/one/shard-1.arrow", bytes(damaged))
    with pytest.raises(DataError, match=r"part 0 of shard memory://sets/one/shard-1\.arrow is damaged"):
        data.take(np.array([7]))
    store.rm("/sets/one", recursive=True)


def test_a_missing_or_torn_shard_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set")
    shard = tmp_path / "set" / "shard-1.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"shard-1\.arrow is 100 bytes"):
        ArrowDataset(str(tmp_path / "set")).take(np.array([6]))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-1\.arrow is missing"):
        ArrowDataset(str(tmp_path / "set")).take(np.array([6]))


def test_one_changed_bit_of_an_array_changes_the_digest() -> None:
    array = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    other = array.copy()
    other.view(np.uint32)[13, 2] ^= 1
    digests = {
        ArrayDataset({"x": array}).digest,
        ArrayDataset({"x": other}).digest,
        ArrayDataset({"y": array}).digest,
        ArrayDataset({"x": array.reshape(20, 3, 1)}).digest,
        ArrayDataset({"x": array.view(np.int32)}).digest,
    }
    assert len(digests) == 5
    assert ArrayDataset({"x": array.copy(order="F")}).digest == ArrayDataset({"x": array}).digest


def test_a_subset_takes_the_rows_of_the_whole() -> None:
    whole = ArrayDataset({"x": np.arange(10) * 10})
    part = Subset(whole, [7, 2, 5])
    assert part.take(np.array([2, 0]))["x"].tolist() == [50, 70]
    assert len({whole.digest, part.digest, Subset(whole, [2, 7, 5]).digest}) == 3
    with pytest.raises(DataError, match="ids 0 to 9"):
        Subset(whole, [10])


class Squares:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), index**2


def test_a_map_style_dataset_is_collated_under_the_given_names() -> None:
    data = MapDataset(Squares(), columns=["x", "square"])
    batch = data.take(np.array([3, 1]))
    assert batch["x"].tolist() == [[3.0], [1.0]]
    assert batch["square"].tolist() == [9, 1]
    with pytest.raises(DataError, match="2 unnamed items"):
        MapDataset(Squares()).take(np.array([0]))
    with pytest.raises(DataError, match="__len__"):
        MapDataset(iter([1]))


def test_a_map_style_dataset_may_bring_its_own_digest() -> None:
    source = Squares()
    generic = MapDataset(source).digest
    source.digest = "v2"  # type: ignore[attr-defined]
    assert MapDataset(source).digest == "v2" != generic


def test_a_frame_becomes_features_and_target() -> None:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "kind": ["x", "y", "x"], "y": [0.0, 1.0, 2.0]})
    data = frame_dataset(frame.astype({"kind": "category"}), ["b", "a"], "kind")
    batch = data.take(np.array([2, 0]))
    assert batch["features"].tolist() == [[2.5, 3.0], [0.5, 1.0]]
    assert batch["target"].tolist() == [0, 0]
    assert frame_dataset(frame, ["a"], "y").take(np.array([1]))["target"].dtype == torch.float32


@pytest.mark.parametrize(
    ("features", "target", "words"),
    [
        (["a", "nope"], "y", "no column 'nope'"),
        (["a", "kind"], "y", "not a number"),
        (["a", "hole"], "y", "missing or infinite values: hole"),
        (["a"], "hole", "'hole' has missing values"),
        (["a"], "kind", "make it categories or numbers"),
    ],
)
def test_a_frame_that_cannot_train_is_refused(features: list[str], target: str, words: str) -> None:
    frame = pd.DataFrame({"a": [1, 2], "hole": [1.0, np.nan], "kind": ["x", "y"], "y": [0, 1]})
    with pytest.raises(DataError, match=words):
        frame_dataset(frame, features, target)


def test_arrays_of_unequal_length_or_of_text_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="'y' is of shape"):
        ArrayDataset({"x": np.zeros(3), "y": np.zeros(4)})
    with pytest.raises(DataError, match="'word' is of type"):
        ArrayDataset({"word": np.array(["a"])})
    with pytest.raises(DataError, match="no columns"):
        ArrayDataset({})


def test_a_shift_moves_each_image_by_at_most_one_pixel_as_its_key_says() -> None:
    image = torch.zeros(200, 2, 8, 8)
    image[:, :, 4, 3] = torch.tensor([1.0, 2.0])
    keys = np.arange(200, dtype=np.uint64)
    moved = shifted({"image": image, "label": torch.arange(200)}, keys)["image"]
    spots = {tuple(spot[1:]) for spot in moved[:, 0].nonzero().tolist()}
    assert spots == {(row, column) for row in (3, 4, 5) for column in (2, 3, 4)}
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    assert torch.equal(shifted({"image": image[7:9]}, keys[7:9])["image"], moved[7:9])


def test_the_scikit_sets_hold_out_a_part_that_never_trains() -> None:
    for splits, size in ((digits(), 1797), (breast_cancer(), 569)):
        assert splits.validation is not None
        assert len(splits.train) + len(splits.validation) == size
    train, held_out = split_ids(569, 0.25, 0)
    assert not set(train.tolist()) & set(held_out.tolist())
    features = breast_cancer().train.take(np.arange(len(train)))["features"]
    assert torch.allclose(features.mean(0), torch.zeros(30), atol=1e-5)
    with pytest.raises(ConfigError, match=r"data\.held_out=1\.0"):
        digits(held_out=1.0)


def test_the_documents_of_a_file_are_all_held_out_or_none(tmp_path: Path) -> None:
    splits = stdlib_documents(str(tmp_path / "documents"), max_length=50)
    found = []
    for part, dataset in (("train", splits.train), ("validation", splits.held_out()[""])):
        files = ArrowDataset(str(tmp_path / "documents" / part), columns=["file"]).take(np.arange(len(dataset)))["file"]
        assert isinstance(files, Ragged)
        found.append({files.bytes(row) for row in range(len(files))})
    assert not found[0] & found[1]
    assert len(found[0]) > 2 * len(found[1]) > 0
    assert splits.collate is not None
    batch = splits.collate(splits.train.take(np.arange(40)))
    assert batch["tokens"].shape == (40, int(batch["lengths"].max()))
    assert 1 <= int(batch["lengths"].min()) < int(batch["lengths"].max()) <= 50
    assert splits.train.digest == stdlib_documents(str(tmp_path / "documents")).train.digest


def test_the_last_item_of_each_user_is_held_out_and_in_no_training_pair() -> None:
    splits = stdlib_calls(users=100, items=50)
    pairs = splits.train.take(np.arange(len(splits.train)))
    held_out = splits.held_out()[""].take(np.arange(100))
    known = set(zip(pairs["user"].tolist(), pairs["item"].tolist(), strict=True))
    assert held_out["user"].tolist() == list(range(100))
    for row in range(100):
        assert (row, held_out["item"][row].item()) not in known
        seen = set(held_out["seen"][row].tolist())
        assert seen == {item for user, item in known if user == row}
        popularity = np.bincount(pairs["item"], minlength=50)
        better = np.flatnonzero(popularity > popularity[held_out["item"][row]])
        assert held_out["popularity_rank"][row] == len(set(better.tolist()) - seen)
    with pytest.raises(ConfigError, match=r"data\.users=99999 must be 1 to \d+"):
        stdlib_calls(users=99999)


def test_no_week_that_is_forecast_in_a_held_out_window_is_in_a_training_window() -> None:
    splits = co2_windows(past=104, horizon=26)
    train, held_out = (found.take(np.arange(len(found))) for found in (splits.train, splits.held_out()[""]))
    weeks = len(splits.train) + 104 + 26 - 1
    assert weeks == round(0.75 * 2284)
    assert len(splits.held_out()[""]) == 2284 - weeks - 26 + 1
    assert torch.equal(held_out["past"][0, -26:], train["future"][-1]), "the first held-out week follows the last known"
    assert torch.isfinite(train["past"]).all()
    assert train["scale"].unique().tolist() == held_out["scale"].unique().tolist()
    with pytest.raises(ConfigError, match=r"data\.held_out=0\.01 leaves .* choose smaller ones"):
        co2_windows(held_out=0.01)


def test_a_process_that_may_open_few_files_reads_many_shards_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import everstep.trainer.data.open_shards as module

    monkeypatch.setattr(module, "_file_limit", lambda: 200)
    url = f"memory://many/{tmp_path.name}"
    shard_datasets.write_dataset(url, [2] * 80, shard_datasets.numbered(160))
    data = ArrowDataset(url, cache=lambda: ShardCache(str(tmp_path / "cache"), 10**9))
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, 160, 8):
        assert data.take(np.arange(start, start + 8))["id"].tolist() == list(range(start, start + 8))  # type: ignore[union-attr]
    assert len(os.listdir("/proc/self/fd")) - before < 3 * 25 + 10

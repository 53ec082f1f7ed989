"""Several datasets as one."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.errors import ConfigError, DataError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.columns import BadSamples, Ragged
from everstep.trainer.data.dataset import ArrayDataset, BatchedReads, MapDataset
from everstep.trainer.data.ordering.interleave import shares
from everstep.trainer.data.ordering.mixture import Mixture, records_of
from everstep.trainer.data.ordering.weighted import Weighted
from everstep.trainer.data.prepared import dataset, mixture
from support.shard_datasets import numbered, write_dataset


def test_samples_of_all_datasets_come_in_the_order_asked(tmp_path: Path) -> None:
    text = [bytes([65 + n]) * n for n in range(9)]
    for name, start, stop in (("a", 0, 4), ("b", 4, 9)):
        columns = {**numbered(stop - start, start=start), "text": text[start:stop]}
        write_dataset(tmp_path / name, [2, stop - start - 2], columns)
    mixed = Mixture([ArrowDataset(str(tmp_path / name)) for name in "ab"], shares([1, 2]))
    ids = np.array([8, 0, 4, 3, 3, 7])
    batch = mixed.take(ids)
    words = batch["text"]
    assert isinstance(words, Ragged)
    assert batch["id"].tolist() == ids.tolist()
    assert [words.bytes(row) for row in range(6)] == [text[i] for i in ids]
    assert mixed.location(5) == f"{tmp_path}/b, shard-0.arrow, row 1"
    assert [record.share for record in records_of(mixed)] == ["1/3", "2/3"]


def test_the_digest_tells_datasets_order_and_shares_apart() -> None:
    one, two = (ArrayDataset({"x": np.arange(5) + start}) for start in (0, 1))
    digests = {
        Mixture([one, two], shares([1, 1])).digest,
        Mixture([two, one], shares([1, 1])).digest,
        Mixture([one, two], shares([1, 2])).digest,
        Mixture([one, one], shares([1, 1])).digest,
    }
    assert len(digests) == 4


def test_datasets_that_do_not_fit_together_are_told_apart_in_one_line() -> None:
    x = ArrayDataset({"x": np.zeros((3, 2))})
    for other, message in (
        (ArrayDataset({"y": np.zeros((3, 2))}), "different columns, x and y"),
        (ArrayDataset({"x": np.zeros((3, 4))}), r"float64 \[2\] and torch.float64 \[4\]"),
        (ArrayDataset({"x": np.zeros((3, 2), np.float32)}), r"torch.float32 \[2\] and torch.float64 \[2\]"),
    ):
        with pytest.raises(DataError, match=message):
            Mixture([x, other], shares([1, 1])).take(np.array([0, 4]))


class Torn:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, int]:
        raise OSError(f"{index} is torn")


def test_a_bad_sample_keeps_its_row_in_the_mixed_batch() -> None:
    mixed = Mixture([ArrayDataset({"x": np.arange(3)}), MapDataset(Torn())], shares([1, 1]))
    with pytest.raises(BadSamples) as caught:
        mixed.take(np.array([0, 4, 2, 3]))
    assert list(caught.value.errors) == [1, 3]


def test_prepared_folders_become_splits_and_their_validation_sets_are_joined(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a" / "train", [4], numbered(4))
    write_dataset(tmp_path / "a" / "validation", [2], numbered(2))
    write_dataset(tmp_path / "b", [5], numbered(5))
    assert dataset(str(tmp_path / "b")).validation is None
    entries = [{"path": str(tmp_path / name), "weight": weight} for name, weight in (("a", 0.7), ("b", 0.3))]
    splits = mixture(entries, cast={"tokens": "int64"})
    assert (len(splits.train), len(splits.validation or [])) == (9, 2)
    assert splits.train.take(np.array([8]))["tokens"].dtype == torch.int64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ([], "name at least one dataset"),
        ([{"path": "x"}], r"data\.mix\[0\] has the keys path; give path and weight"),
        ([{"path": "x", "wait": 1}], "give path and weight"),
    ],
)
def test_a_mix_that_is_not_one_is_refused(mix: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture(mix)


def test_a_folder_that_is_no_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare it with `everstep data prepare`"):
        dataset(str(tmp_path))


def test_a_wrapped_dataset_reads_batches_at_once_exactly_if_all_its_parts_do(tmp_path: Path) -> None:
    write_dataset(tmp_path, [2, 2], numbered(4))
    shards, array, single = ArrowDataset(str(tmp_path)), ArrayDataset({"id": np.arange(4)}), MapDataset(Torn())
    for parts, batched in (([shards, array], True), ([shards, single], False)):
        mixed = Mixture(parts, shares([1, 1]))
        for found in (mixed, Weighted(mixed, np.ones(len(mixed))), pickle.loads(pickle.dumps(mixed))):
            assert isinstance(found, BatchedReads) is batched
    assert isinstance(Weighted(array, np.ones(4)), BatchedReads)
    assert not isinstance(Weighted(single, np.ones(len(single))), BatchedReads)


def test_a_dataset_drawn_by_weight_keeps_its_shards(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3, 1], numbered(4))
    shards = ArrowDataset(str(tmp_path))
    (plain,), (drawn,) = records_of(shards), records_of(Weighted(shards, np.ones(4)))
    assert (drawn.place, drawn.rows, drawn.files) == (plain.place, plain.rows, plain.files) == (
        str(tmp_path), [3, 1], ["shard-0.arrow", "shard-1.arrow"],
    )  # fmt: skip
    (memory,) = records_of(Weighted(ArrayDataset({"id": np.arange(4)}), np.ones(4)))
    assert (memory.place, memory.rows, memory.files) == ("Weighted", [4], ())
    assert plain.weights is None
    assert drawn.weights == memory.weights is not None

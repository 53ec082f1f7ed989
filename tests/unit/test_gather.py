"""From ids to batches: ragged columns, samples that are left out, and gathers of several microbatches at once."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everstep.config import BadSample, ExcludeConfig, LoaderConfig
from everstep.errors import ConfigError, DataError
from everstep.rank_env import RankInfo
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from everstep.trainer.data.columns import BadSamples, Columns, Ragged
from everstep.trainer.data.dataset import ArrayDataset, MapDataset
from everstep.trainer.data.fetcher import Fetcher, Microbatch
from everstep.trainer.data.loader import Loader, evaluation_batches
from everstep.trainer.data.ordering.exclusion import Exclusion
from everstep.trainer.data.ordering.order import SampleOrder
from support.shard_datasets import numbered, write_dataset

WORDS = [b"", b"a", b"bc" * 700, b"def", bytes(range(256)), b"\0", b"end"]


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_samples_of_any_length_come_back_as_they_were_written(tmp_path: Path, compression: str) -> None:
    texts = [word.decode("latin1") for word in WORDS]
    lists = [list(range(n)) for n in (0, 3, 1, 0, 5, 2, 2)]
    columns = {"raw": WORDS, "text": texts, "list": lists, "flag": np.arange(7) % 2 == 0}
    write_dataset(tmp_path / "set", [3, 0, 4], columns, compression)
    data = ArrowDataset(str(tmp_path / "set"), cache=lambda: ShardCache(str(tmp_path / "cache"), 10**9))
    ids = np.array([6, 2, 2, 0, 4])
    batch = data.take(ids)
    raw, text, numbers = (batch[name] for name in ("raw", "text", "list"))
    assert isinstance(raw, Ragged)
    assert isinstance(text, Ragged)
    assert isinstance(numbers, Ragged)
    assert [raw.bytes(row) for row in range(5)] == [WORDS[i] for i in ids]
    assert [text.bytes(row).decode() for row in range(5)] == [texts[i] for i in ids]
    assert [numbers[row].tolist() for row in range(5)] == [lists[i] for i in ids]
    assert batch["flag"].tolist() == [True, True, True, True, True]
    assert [raw.slice(1, 4).bytes(row) for row in range(3)] == [WORDS[i] for i in ids[1:4]]
    assert raw.select(torch.tensor([4, 0])).bytes(1) == WORDS[6]


def test_columns_are_chosen_and_cast_by_name(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4], numbered(8))
    batch = ArrowDataset(str(tmp_path), columns=["tokens"], cast={"tokens": "int64"}).take(np.array([7, 0]))
    assert list(batch) == ["tokens"]
    assert batch["tokens"].dtype == torch.int64
    with pytest.raises(ConfigError, match=r"no column 'token'; it has id, tokens"):
        ArrowDataset(str(tmp_path), columns=["token"])
    with pytest.raises(ConfigError, match=r"data\.cast\.tokens='int65' is no type of torch"):
        ArrowDataset(str(tmp_path), cast={"tokens": "int65"})
    with pytest.raises(IndexError, match="samples 0 to 7"):
        ArrowDataset(str(tmp_path)).take(np.array([8]))


def test_a_dataset_goes_to_another_process_by_pickle(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4], numbered(8))
    data = ArrowDataset(str(tmp_path))
    data.take(np.arange(8))
    assert pickle.loads(pickle.dumps(data)).take(np.array([5]))["id"].tolist() == [5]


def test_a_flipped_bit_of_a_local_shard_is_found_when_asked_for(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4], numbered(8))
    shard = tmp_path / "shard-1.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard .*shard-1\.arrow is damaged"):
        ArrowDataset(str(tmp_path), verify=True).take(np.array([5]))


class Odd:
    """A map-style dataset of which every third sample fails."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index % 3 == 0:
            raise ValueError(f"file {index} is torn")
        return {"id": index}


def refuse_thirds(columns: Columns) -> Columns:
    ids = columns["id"]
    assert isinstance(ids, Tensor)
    errors = {row: "is torn" for row, sample in enumerate(ids.tolist()) if sample % 3 == 0}
    if errors:
        raise BadSamples(errors)
    return columns


def microbatches_of(gather: Fetcher, world: int, micro: int, steps: int, **options: Any) -> list[Microbatch]:
    """All real microbatches of the run's first steps, in the order of the run."""
    order = SampleOrder(len(gather.dataset), 6, seed=3)
    ranks = [
        Loader(gather, order, micro, RankInfo(rank, world), "cpu", LoaderConfig(**options)) for rank in range(world)
    ]
    try:
        taken = [list(islice(loader.steps(0), steps)) for loader in ranks]
    finally:
        for loader in ranks:
            loader.close()
    turns = (m for step in range(steps) for turn in zip(*(rank[step] for rank in taken), strict=True) for m in turn)
    return [microbatch for microbatch in turns if microbatch.real]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_do_not_decode_are_left_out_alike_on_every_world(workers: int) -> None:
    tables = Fetcher(ArrayDataset({"id": np.arange(12)}), 0, decode=refuse_thirds, on_bad=BadSample.skip)
    own = Fetcher(MapDataset(Odd()), 0, on_bad=BadSample.skip)
    for gather in (tables, own):
        alone = microbatches_of(gather, 1, 2, 4, prefetch=0)
        seen = [m.ids.tolist() for m in alone]
        assert all(sample % 3 for ids in seen for sample in ids)
        assert sum(len(ids) for ids in seen) == 2 * 8
        for world in (2, 3):
            assert [m.ids.tolist() for m in microbatches_of(gather, world, 2, 4, workers=workers)] == seen


def test_a_bad_sample_ends_the_run_with_its_place_unless_told_otherwise(tmp_path: Path) -> None:
    write_dataset(tmp_path, [4, 4], numbered(8))
    gather = Fetcher(ArrowDataset(str(tmp_path)), 0, decode=refuse_thirds)
    with pytest.raises(DataError, match=r"shard-\d\.arrow, row \d: is torn; mend it, .* bad_samples=skip"):
        microbatches_of(gather, 1, 2, 2)
    with pytest.raises(DataError, match="sample 0: ValueError: file 0 is torn"):
        next(evaluation_batches(Fetcher(MapDataset(Odd()), 0), 4, RankInfo(), "cpu"))


def test_a_microbatch_of_which_nothing_is_left_passes_with_weight_zero() -> None:
    gather = Fetcher(ArrayDataset({"id": np.arange(12)}), 0, decode=refuse_thirds, on_bad=BadSample.skip)
    order = SampleOrder(12, 6, seed=3, shuffle=False)
    step = next(Loader(gather, order, 1, RankInfo(), "cpu", LoaderConfig(prefetch=0)).steps(0))
    assert [m.real for m in step] == [False, True, True, False, True, True]
    assert all(len(m.batch["id"]) == 1 for m in step)


def test_a_dataset_of_which_nothing_decodes_says_so() -> None:
    gather = Fetcher(ArrayDataset({"id": np.zeros(4)}), 0, decode=refuse_thirds, on_bad=BadSample.skip)
    with pytest.raises(DataError, match="all excluded or cannot be decoded"):
        microbatches_of(gather, 1, 2, 1, prefetch=0)


@given(first=st.integers(1, 5), samples=st.sets(st.integers(0, 40), max_size=20), world=st.integers(1, 3))
@settings(max_examples=40)
def test_excluded_samples_are_gone_from_their_step_on_and_nothing_else_moves(
    first: int, samples: set[int], world: int
) -> None:
    data = ArrayDataset({"id": np.arange(12)})
    before = microbatches_of(Fetcher(data, 0), 1, 2, 6, prefetch=0)
    out = Exclusion([ExcludeConfig(from_step=first, samples=sorted(samples))])
    if len(samples & set(range(12))) == 12:
        return
    after = microbatches_of(Fetcher(data, 0, excluded=out), world, 2, 6, prefetch=0)
    expected = []
    for number, microbatch in enumerate(before):
        gone = samples if number // 3 + 1 >= first else set()
        kept = [sample for sample in microbatch.ids.tolist() if sample not in gone]
        expected += [kept] if kept else []
    assert [m.ids.tolist() for m in after] == expected


class Unbatched(ArrowDataset):
    """A dataset without the ability to read several batches at once."""

    take_batches = None  # type: ignore[assignment]


@pytest.mark.parametrize("opened", [False, True])
def test_many_microbatches_at_once_are_what_each_is_alone(tmp_path: Path, opened: bool) -> None:
    write_dataset(tmp_path, [5, 9, 6], {**numbered(20), "text": ["x" * n for n in range(20)]})

    def lengths(columns: Columns) -> dict[str, Tensor]:
        text, ids = columns["text"], columns["id"]
        assert isinstance(text, Ragged)
        assert isinstance(ids, Tensor)
        return {"id": ids, "length": text.lengths, "in_batch": torch.full_like(ids, len(text))}

    data = ArrowDataset(str(tmp_path))
    if opened:
        data.take(np.arange(20))
    gather = Fetcher(data, 0, collate=lengths)
    together = microbatches_of(gather, 2, 2, 9, prefetch=0)
    alone = microbatches_of(replace(gather, dataset=Unbatched(str(tmp_path))), 2, 2, 9, prefetch=0)
    assert [m.ids.tolist() for m in together] == [m.ids.tolist() for m in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.batch["length"].tolist() == other.batch["length"].tolist() == one.ids.tolist()
        assert one.batch["in_batch"].tolist() == other.batch["in_batch"].tolist()


def test_a_fault_in_what_is_gathered_together_comes_at_its_place_in_the_order(tmp_path: Path) -> None:
    write_dataset(tmp_path, [10, 10], numbered(20))
    (tmp_path / "shard-1.arrow").unlink()
    gather = Fetcher(ArrowDataset(str(tmp_path)), 0)
    steps = Loader(gather, SampleOrder(20, 2, 0, shuffle=False), 2, RankInfo(), "cpu", LoaderConfig(prefetch=0)).steps(
        0
    )
    assert [next(steps)[0].ids.tolist() for _ in range(5)][-1] == [8, 9]
    with pytest.raises(DataError, match=r"shard-1\.arrow is missing"):
        next(steps)


def test_ragged_samples_need_somebody_who_makes_tensors_of_them(tmp_path: Path) -> None:
    write_dataset(tmp_path, [3], {"text": ["a", "bc", ""]})
    with pytest.raises(DataError, match=r"column 'text' differ in length: give data\.collate"):
        microbatches_of(Fetcher(ArrowDataset(str(tmp_path)), 0), 1, 1, 1)

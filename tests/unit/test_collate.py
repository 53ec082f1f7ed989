"""Collating: nothing is lost or made up, whatever the lengths and types, and errors say which key to change."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everstep.errors import ConfigError, DataError
from everstep.rank_env import RankInfo
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.collate import Bucket, Pack, Pad, Segments
from everstep.trainer.data.columns import Ragged
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.loader import Loader
from everstep.trainer.data.ordering.order import SampleOrder
from everstep.trainer.plugins import instantiate
from support.shard_datasets import write_dataset

DTYPES = [
    torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=12)


def ragged(lengths: list[int], dtype: torch.dtype = torch.int64, first: int = 1) -> Ragged:
    """Samples of these lengths; all values are different, as far as the type goes."""
    values = torch.arange(first, first + sum(lengths)).remainder(120).to(dtype)
    return Ragged(values, torch.tensor([0, *lengths]).cumsum(0))


def listed(column: Ragged) -> list[list[float]]:
    return [column[row].tolist() for row in range(len(column))]


def unpad(padded: Tensor, lengths: Tensor) -> list[list[float]]:
    return [row[:length].tolist() for row, length in zip(padded, lengths.tolist(), strict=True)]


def unpack(packed: dict[str, Tensor], samples: int, column: str = "tokens") -> list[list[float]]:
    """What each sample's segment holds, row after row."""
    return [packed[column][packed["segments"] == number].tolist() for number in range(1, samples + 1)]


@given(LENGTHS, st.sampled_from(DTYPES), st.integers(1, 9))
def test_padding_keeps_every_value_of_any_type_and_the_lengths_take_it_off_again(
    lengths: list[int], dtype: torch.dtype, multiple: int
) -> None:
    column = ragged(lengths, dtype)
    batch = Pad(multiple_of=multiple)({"x": column})
    assert batch["x"].dtype == dtype
    assert batch["lengths"].tolist() == lengths
    assert batch["lengths"].dtype == torch.int64
    assert unpad(batch["x"], batch["lengths"]) == listed(column)
    width = batch["x"].shape[1]
    assert width % multiple == 0
    assert width - multiple < max(1, *lengths, 1) <= width
    assert not batch["x"][torch.arange(width) >= batch["lengths"][:, None]].double().any()


@given(LENGTHS, st.integers(1, 30))
def test_a_maximal_length_cuts_the_ends_of_longer_samples(lengths: list[int], longest: int) -> None:
    column = ragged(lengths)
    batch = Pad(max_length=longest, value=-7)({"x": column})
    assert unpad(batch["x"], batch["lengths"]) == [sample[:longest] for sample in listed(column)]
    assert batch["lengths"].tolist() == [min(length, longest) for length in lengths]
    assert batch["x"].shape[1] <= longest


def test_a_view_of_some_samples_is_padded_and_packed_like_those_samples_alone() -> None:
    whole = ragged([3, 5, 0, 4, 2])
    offsets = whole.offsets[1:4]
    for view in (whole.slice(1, 3), Ragged(whole.values, offsets)):
        assert unpad(*Pad()({"x": view}).values()) == listed(whole)[1:3]
        assert unpack(Pack(4)({"tokens": view}), 2) == listed(whole)[1:3]


def test_several_columns_have_values_and_lengths_of_their_own_and_tensors_pass_untouched() -> None:
    label = torch.arange(2)
    columns = {"tokens": ragged([1, 3], torch.int32), "labels": ragged([2, 2]), "label": label}
    batch = Pad(value={"labels": -100}, multiple_of=4)(columns)
    assert batch["tokens_lengths"].tolist() == [1, 3]
    assert batch["labels_lengths"].tolist() == [2, 2]
    assert batch["labels"].tolist() == [[5 - 4, 2, -100, -100], [3, 4, -100, -100]]
    assert batch["tokens"].tolist() == [[1, 0, 0, 0], [2, 3, 4, 0]]
    assert batch["label"] is label


@given(LENGTHS)
def test_a_bucket_is_the_smallest_boundary_that_holds_the_longest_sample(lengths: list[int]) -> None:
    column, boundaries = ragged(lengths), [4, 9, 23]
    batch = Bucket(boundaries)({"x": column})
    assert batch["x"].shape[1] == min(b for b in boundaries if b >= max(lengths))
    assert unpad(batch["x"], batch["lengths"]) == listed(column)


def test_a_sample_beyond_the_last_boundary_is_refused_with_its_length_or_cut_where_that_is_wanted() -> None:
    column = ragged([3, 12])
    with pytest.raises(DataError, match=r"12 values where .*data\.collate\.boundaries is 8.*data\.collate\.truncate"):
        Bucket([4, 8])({"x": column})
    batch = Bucket([4, 8], truncate=True)({"x": column})
    assert unpad(batch["x"], batch["lengths"]) == [sample[:8] for sample in listed(column)]


@given(LENGTHS, st.integers(1, 16), st.sampled_from(DTYPES))
def test_packing_keeps_every_token_exactly_once_and_in_order(
    lengths: list[int], length: int, dtype: torch.dtype
) -> None:
    column = ragged(lengths, dtype)
    batch = Pack(length)({"tokens": column})
    segments, positions = batch["segments"], batch["positions"]
    assert batch["tokens"].dtype == dtype
    assert segments.dtype == torch.int32
    assert batch["tokens"].shape == segments.shape == positions.shape == (len(segments), length)
    assert unpack(batch, len(lengths)) == listed(column)
    assert int((segments != 0).sum()) == sum(lengths)
    assert not batch["tokens"][segments == 0].double().any()


@given(LENGTHS, st.integers(1, 16))
def test_a_segment_is_one_run_of_a_row_with_positions_that_count_from_zero(lengths: list[int], length: int) -> None:
    batch = Pack(length)({"tokens": ragged(lengths)})
    for segments, positions in zip(batch["segments"].tolist(), batch["positions"].tolist(), strict=True):
        starts = [i for i in range(length) if i == 0 or segments[i] != segments[i - 1]]
        runs = [segments[i] for i in starts]
        assert len(set(runs)) == len(runs)
        assert 0 not in runs[:-1]
        expected = [0 if not segments[i] else i - max(s for s in starts if s <= i) for i in range(length)]
        assert positions == expected


def test_a_sample_goes_into_the_first_row_with_room_and_one_too_long_takes_rows_of_its_own() -> None:
    batch = Pack(6)({"tokens": ragged([4, 3, 2, 14, 3])})
    assert batch["segments"].tolist() == [
        [1, 1, 1, 1, 3, 3], [2, 2, 2, 5, 5, 5], [4] * 6, [4] * 6, [4, 4, 0, 0, 0, 0],
    ]  # fmt: skip
    assert batch["positions"][4].tolist() == [0, 1, 0, 0, 0, 0]


@given(LENGTHS, st.integers(2, 16))
def test_a_separator_ends_every_sample_even_an_empty_one(lengths: list[int], length: int) -> None:
    column = ragged(lengths, torch.uint16)
    batch = Pack(length, separator=65535)({"tokens": column})
    assert unpack(batch, len(lengths)) == [[*sample, 65535] for sample in listed(column)]


def test_columns_of_the_same_lengths_are_packed_alike_and_others_are_refused() -> None:
    columns: dict[str, Tensor | Ragged] = {"tokens": ragged([3, 2]), "mask": ragged([3, 2], torch.bool)}
    batch = Pack(4)(columns)
    assert unpack(batch, 2, "mask") == listed(columns["mask"])  # type: ignore[arg-type]
    for other in (torch.arange(2), ragged([2, 3])):
        with pytest.raises(DataError, match="'label' has not the lengths of 'tokens'"):
            Pack(4)({**columns, "label": other})
    with pytest.raises(DataError, match=r"data\.collate\.separator=0 .*no counterpart in mask"):
        Pack(4, separator=0)(columns)
    with pytest.raises(DataError, match="'segments' is one that"):
        Pack(4)({"tokens": ragged([1]), "segments": ragged([1])})


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=5), st.sampled_from(DTYPES))
def test_segments_of_blocks_change_after_each_separator_and_positions_begin_again(
    rows: list[list[int]], dtype: torch.dtype
) -> None:
    tokens = torch.tensor(rows).to(dtype)
    batch = Segments(separator=0)({"tokens": tokens, "id": torch.arange(len(rows))})
    assert batch["tokens"] is tokens
    assert batch["segments"].dtype == torch.int32
    for row, segments, positions in zip(
        tokens.double().tolist(), batch["segments"].tolist(), batch["positions"].tolist(), strict=True
    ):
        segment, position = 1, 0
        for i, value in enumerate(row):
            assert (segments[i], positions[i]) == (segment, position)
            segment, position = (segment + 1, 0) if value == 0 else (segment, position + 1)


@pytest.mark.parametrize("collate", [Pad(), Pad(max_length=5), Bucket([4, 32]), Pack(8), Pack(8, separator=9)])
def test_a_batch_is_collated_alike_each_time_here_and_in_a_worker(collate: Any) -> None:
    torch.manual_seed(1)
    first = collate({"tokens": ragged([9, 0, 3, 17, 1])})
    torch.rand(3)
    again = pickle.loads(pickle.dumps(collate))({"tokens": ragged([9, 0, 3, 17, 1])})
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_batch_that_was_passed_is_left_as_it_was() -> None:
    column = ragged([3, 9, 2])
    before = column.values.clone()
    for collate in (Pad(max_length=4), Bucket([16]), Pack(4), Pack(4, separator=1)):
        out = collate({"tokens": column})
        out["tokens"].fill_(99)
        assert torch.equal(column.values, before)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: Pad(multiple_of=0), r"data\.collate\.multiple_of=0"),
        (lambda: Pad(max_length=0), r"data\.collate\.max_length=0"),
        (lambda: Pad(max_length=10, multiple_of=8), r"max_length=10 .*multiple_of=8"),
        (lambda: Bucket([]), r"boundaries=\[\]"),
        (lambda: Bucket([8, 4]), r"boundaries=\[8, 4\]"),
        (lambda: Bucket([0, 4]), r"boundaries=\[0, 4\]"),
        (lambda: Pack(0), r"data\.collate\.length=0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_their_key(build: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build()


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (Pad(["text"]), "names the column 'text'; the dataset has tokens, other, label"),
        (Pad(["label"]), r"'label', whose samples are all of shape \[2\]"),
        (Pad(["tokens"]), r"'other' has samples of different lengths .*data\.collate\.columns"),
        (Pad(value=-1), r"data\.collate\.value=-1 does not fit column 'tokens', which is torch.uint8"),
        (Pad(value=0.5), r"value=0\.5 does not fit"),
        (Pad(value=float("nan")), "value=nan does not fit"),
        (Bucket([64], value=256), "value=256 does not fit"),
        (Segments(0), r"data\.collate\.column='tokens' must be blocks of one length"),
        (Segments(0, "absent"), r"data\.collate\.column='absent'"),
    ],
)
def test_a_batch_that_does_not_fit_the_settings_is_refused_in_one_line(collate: Any, message: str) -> None:
    columns = {"tokens": ragged([2, 3], torch.uint8), "other": ragged([2, 3]), "label": torch.zeros(2, 2)}
    with pytest.raises(DataError, match=message) as caught:
        collate(columns)
    assert "\n" not in str(caught.value)


def test_names_of_lengths_hide_no_column() -> None:
    with pytest.raises(DataError, match=r"data\.collate\.lengths='lengths' would hide the column 'lengths'"):
        Pad()({"x": ragged([1]), "lengths": torch.ones(1)})
    assert set(Pad(lengths="sizes")({"x": ragged([1]), "lengths": torch.ones(1)})) == {"x", "lengths", "sizes"}


def test_a_collate_node_of_a_config_is_one_of_these() -> None:
    node = {"_target_": "everstep.data.Bucket", "boundaries": [8, 16]}
    collate = instantiate(node, "data.collate", [])
    assert collate({"x": ragged([9])})["x"].shape == (1, 16)


def test_an_empty_batch_and_empty_samples_have_shapes_too() -> None:
    empty = Ragged(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert Pad()({"x": empty})["x"].shape == (0, 1)
    assert Pack(4)({"tokens": empty})["tokens"].shape == (0, 4)
    assert Pad()({"x": ragged([0, 0])})["x"].shape == (2, 1)
    assert Pack(4)({"tokens": ragged([0, 0])})["segments"].shape == (0, 4)
    assert np.prod(Bucket([8])({"x": ragged([0])})["x"].shape) == 8


def microbatches_of(
    rank: int, world: int, collate: Any, data: ArrowDataset
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """(step, microbatch) → batch, of three steps as one rank sees them."""
    loader = Loader(
        Fetcher(data, 7, collate=collate), SampleOrder(len(data), 9, seed=7), 2, RankInfo(rank, world), "cpu"
    )
    try:
        steps = islice(loader.steps(0), 3)
        return {(step, m.index): m.batch for step, found in enumerate(steps) for m in found if m.real}
    finally:
        loader.close()


@pytest.mark.parametrize("collate", [Pad(), Bucket([8, 30]), Pack(16)], ids=lambda one: type(one).__name__)
def test_a_microbatch_has_the_same_tensors_however_many_ranks_there_are(collate: Any, tmp_path: Path) -> None:
    samples = [[number] * (number * 7 % 23) for number in range(31)]
    write_dataset(tmp_path / "set", [10, 21], {"tokens": samples})
    data = ArrowDataset(str(tmp_path / "set"))
    alone = microbatches_of(0, 1, collate, data)
    together = [microbatches_of(rank, 3, collate, data) for rank in range(3)]
    assert len(alone) == sum(map(len, together)) == 3 * 5
    for found in together:
        for place, batch in found.items():
            assert batch.keys() == alone[place].keys()
            assert all(torch.equal(batch[name], alone[place][name]) for name in batch)

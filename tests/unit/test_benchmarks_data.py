"""The dataset benchmark measures what it says: everybody stores the same samples, and each is told from the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.data import source
from benchmarks.data.contestants.everstep import Everstep
from benchmarks.data.contestants.memmap import Memmap
from benchmarks.data.reader import Batch, Joined, ids_of
from benchmarks.table import ratios

BATCH = 32


def stored(kind: str, folder: Path) -> source.Source:
    source.make(kind, 1, folder / "source")
    return source.load(kind, folder / "source")


@pytest.mark.parametrize("kind", source.KINDS)
def test_samples_are_the_same_each_time_and_begin_with_their_numbers(kind: str, tmp_path: Path) -> None:
    first, again = stored(kind, tmp_path / "a"), stored(kind, tmp_path / "b")
    assert np.array_equal(first.values, again.values)
    assert np.array_equal(first.offsets, again.offsets)
    batch: Batch = [first.sample(number).tobytes() for number in range(len(first))]
    if kind == "tokens":
        batch = torch.from_numpy(first.blocks.astype(np.int64))
    assert ids_of(batch) == list(range(len(first)))


@pytest.mark.parametrize("kind", source.KINDS)
def test_pieces_hold_every_sample_once_and_no_more_than_a_shard(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SHARD_BYTES", 200_000)
    samples = stored(kind, tmp_path)
    pieces = samples.pieces()
    assert [number for start, stop in pieces for number in range(start, stop)] == list(range(len(samples)))
    assert len(pieces) > 4
    for start, stop in pieces:
        size = (samples.offsets[stop] - samples.offsets[start]) * samples.values.itemsize
        assert size <= 200_000 + 15_000


@pytest.mark.parametrize(("reader", "kind"), [(r, k) for r in (Memmap, Everstep) for k in source.KINDS])
def test_a_reader_gives_every_sample_once_and_goes_on_where_it_was(
    reader: Callable[..., Any], kind: str, tmp_path: Path
) -> None:
    samples = stored(kind, tmp_path)
    (tmp_path / "set").mkdir()
    reader.write(samples, tmp_path / "set")  # type: ignore[attr-defined]
    batches = list(reader(tmp_path / "set", kind, BATCH, None))
    numbers = [number for batch in batches for number in ids_of(batch)]
    # Everstep's last batch would go on into the next epoch, and is left out here.
    assert len(set(numbers)) == len(numbers) > len(samples) - BATCH
    assert numbers != sorted(numbers)
    first = batches[0]
    if isinstance(first, Joined):
        content = first.values[first.offsets[3] : first.offsets[4]].tobytes()
        assert content == samples.sample(ids_of(first)[3]).tobytes()
    else:
        assert first.dtype == torch.int64
        assert np.array_equal(first[3].numpy(), samples.sample(ids_of(first)[3]))
    left = reader(tmp_path / "set", kind, BATCH, None)
    taken = iter(left)
    next(taken), next(taken)
    resumed = reader(tmp_path / "set", kind, BATCH, left.state())
    assert ids_of(next(iter(resumed))) == ids_of(batches[2])


def test_ratios_are_to_the_same_round() -> None:
    assert ratios([{"a": 2.0, "b": 1.0}, {"a": 9.0}, {"a": 9.0, "b": 3.0}], "a", "b") == [2.0, 3.0]

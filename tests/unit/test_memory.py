"""Rows gathered by address: the same as NumPy gathers them, of any type and width, from any number of arrays."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.dataset.index import ShardIndex
from everstep.dataset.mapped_shard import RaggedArray, inflate, map_shard
from everstep.trainer.data.address_gather import Rows, address_of, element_of, gather_ragged
from everstep.trainer.data.arrow_reader import ArrowDataset
from support.shard_datasets import write_dataset


@given(
    dtype=st.sampled_from(["bool", "uint8", "uint16", "int32", "float16", "float64", "complex64"]),
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
)
def test_rows_of_several_arrays_come_in_one_gather(
    dtype: str, shape: tuple[int, ...], sizes: list[int], data: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    arrays = [(rng.random((size, *shape)) * 100).astype(dtype) for size in sizes]
    picks = [(n, row) for n, size in enumerate(sizes) for row in range(size)]
    chosen = data.draw(st.lists(st.sampled_from(picks), max_size=30))
    width = int(np.prod(shape))
    elements = np.array([element_of(arrays[n]) + row * width for n, row in chosen], dtype=np.int64)
    out = Rows(dtype, shape, torch.from_numpy(arrays[0]).dtype)(elements)
    expected = [arrays[n][row] for n, row in chosen]
    assert np.array_equal(out.numpy(), np.array(expected, dtype=dtype).reshape(out.shape))


@pytest.mark.parametrize("width", [1, 16_383, 16_384, 16_385, 70_000, 400_000])
def test_narrow_and_wide_rows_are_cast_on_the_way(width: int) -> None:
    array = np.random.default_rng(1).integers(0, 60_000, (5, width)).astype(np.uint16)
    rows = np.array([4, 0, 0, 3])
    out = Rows("uint16", (width,), torch.bfloat16)(element_of(array) + rows * width)
    assert torch.equal(out, torch.from_numpy(array[rows]).to(torch.bfloat16))


def test_rows_of_different_lengths_are_put_end_to_end() -> None:
    values = np.arange(20, dtype=np.int32)
    offsets = np.array([0, 0, 5, 6, 20])
    rows = np.array([3, 0, 1, 2])
    places = element_of(offsets) + rows
    found, bounds = gather_ragged(places, np.full(4, address_of(values)), np.full(4, 20), torch.int32)
    assert found.tolist() == [*range(6, 20), *range(5), 5]
    assert bounds.tolist() == [0, 14, 14, 19, 20]


def test_wide_samples_of_many_shards_are_those_that_were_written(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (9, 3, 120, 100)).astype(np.uint8)
    write_dataset(tmp_path, [2, 4, 3], {"pixels": pixels})
    ids = np.array([8, 1, 1, 5])
    assert np.array_equal(ArrowDataset(str(tmp_path)).take(ids)["pixels"].numpy(), pixels[ids])  # type: ignore[union-attr]


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_was_freed_comes_again_without_a_page_fault() -> None:
    script = """
        import resource
        import numpy as np
        from everstep.process_setup import keep_freed_memory
        keep_freed_memory()
        for turn in range(400):
            if turn == 100:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            batch = np.ones(3_000_000 + 1000 * (turn % 7), np.uint8)
            del batch
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 * 10, "each of 300 batches would take some 730 faults"


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(
    "columns",
    [
        {"tokens": np.arange(48, dtype=np.uint16).reshape(3, 16)},
        {"label": np.arange(3, dtype=np.uint8), "a column with a longer name": np.ones((3, 5))},
        {"text": ["", "a", "bcd"]},
    ],
)
def test_the_first_column_of_a_shard_begins_at_a_multiple_of_64_bytes(
    tmp_path: Path, columns: dict[str, Any], compression: str
) -> None:
    write_dataset(tmp_path, [3], columns, compression)
    path = str(tmp_path / "shard-0.arrow")
    if compression != "none":
        inflate(path, str(tmp_path / "inflated"))
        path = str(tmp_path / "inflated")
    mapped = map_shard(path, ShardIndex.read(str(tmp_path)).columns)
    first = mapped.columns[0][next(iter(columns))]
    array = first.offsets if isinstance(first, RaggedArray) else first
    assert (address_of(array) - mapped.base) % 64 == 0

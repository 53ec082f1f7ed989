"""Batches cut from larger gathers: the same rows, whatever is gathered together."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.trainer.data.columns import ALONE_BYTES, TOGETHER_BYTES, Columns, Ragged, pieces


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    row_bytes=st.sampled_from([0, 1, 4096, ALONE_BYTES, 2 * TOGETHER_BYTES]),
)
def test_pieces_are_the_rows_between_the_bounds(sizes: list[int], row_bytes: int) -> None:
    bounds = [0, *accumulate(sizes)]

    def gather(start: int, stop: int) -> Columns:
        rows = torch.arange(start, stop)
        return {"row": rows, "bytes": Ragged.of([torch.full((int(row) % 3,), int(row)) for row in rows])}

    found = list(pieces(gather, bounds, row_bytes))
    assert len(found) == len(sizes)
    for (start, stop), piece in zip(pairwise(bounds), found, strict=True):
        ragged = piece["bytes"]
        assert isinstance(ragged, Ragged)
        assert torch.equal(torch.as_tensor(piece["row"]), torch.arange(start, stop))
        assert [len(ragged[row]) for row in range(len(ragged))] == [row % 3 for row in range(start, stop)]


@pytest.mark.parametrize(("rows", "asked"), [(8, [128, 128, 64]), (24, [24] * 6)])
def test_small_pieces_are_gathered_together_and_large_ones_alone(rows: int, asked: list[int]) -> None:
    seen = []

    def gather(start: int, stop: int) -> Columns:
        seen.append(stop - start)
        return {"row": torch.arange(start, stop)}

    bounds = list(range(0, sum(asked) + 1, rows))
    assert len(list(pieces(gather, bounds, 8192))) == len(bounds) - 1
    assert seen == asked

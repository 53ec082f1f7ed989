"""Samples sorted by length within windows: similar microbatches, and all that any order must keep."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.config import OrderConfig, RunConfig
from everstep.dataset.prepare import prepare_rows
from everstep.errors import ConfigError
from everstep.frozen_config import freeze
from everstep.run_folder import CONFIG, RunFolder
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.dataset import ArrayDataset
from everstep.trainer.data.ordering.data_record import order_sources, write_record
from everstep.trainer.data.ordering.length_order import order_of
from everstep.trainer.data.ordering.mixture import Mixture, records_of
from everstep.trainer.data.ordering.order import OrderSource, SampleOrder
from everstep.trainer.data.ordering.trace import Trace
from everstep.trainer.data.sample_lengths import sample_lengths


def config(batch: int, micro: int, batches: int, seed: int = 0, column: str | None = "tokens") -> RunConfig:
    order = OrderConfig(length_column=column, length_window=batches)
    return RunConfig(run="mine", steps=30, global_batch=batch, micro_batch=micro, seed=seed, order=order)


@st.composite
def cases(draw: st.DrawFn) -> tuple[SampleOrder, SampleOrder, RunConfig]:
    """The order sorted by length, the same one without, and the run."""
    rows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    draws = np.random.default_rng(draw(st.integers(0, 99)))
    sources = [
        OrderSource([count], Fraction(1, len(rows)), None, draws.integers(1, 9, count).astype(float)) for count in rows
    ]
    batch, micro, batches = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**63 - 1))
    run, plain = config(batch, micro, batches, seed), config(batch, micro, batches, seed, column=None)
    return order_of(run, sources), order_of(plain, sources), run


@given(case=cases(), first=st.integers(0, 10**6))
def test_a_window_has_the_visits_of_the_order_without_sorting(
    case: tuple[SampleOrder, SampleOrder, RunConfig], first: int
) -> None:
    order, plain, run = case
    size = run.global_batch * run.order.length_window
    found, expected = (set(zip(*map(np.ndarray.tolist, each.at(first * size, np.arange(size))), strict=True))
                       for each in (order, plain))  # fmt: skip
    assert found == expected


@given(case=cases(), position=st.integers(0, 10**12))
def test_the_inverse_leads_back_and_a_position_gives_one_sample_however_it_is_reached(
    case: tuple[SampleOrder, SampleOrder, RunConfig], position: int
) -> None:
    order, _, _ = case
    epochs, ids = order.at(position, np.arange(40).reshape(4, 10))
    for offset, (epoch, sample) in enumerate(zip(epochs.ravel().tolist(), ids.ravel().tolist(), strict=True)):
        assert order.position_of(sample, epoch) == position + offset
        assert order.ids(position + offset, 1)[0] == sample


def test_the_samples_of_a_microbatch_are_neighbours_by_length() -> None:
    lengths = np.random.default_rng(0).permutation(400).astype(float)
    run = config(batch=20, micro=6, batches=5)  # the last microbatch of each batch has 2 samples
    order = order_of(run, [OrderSource([400], lengths=lengths)])
    shorter = []
    for window in range(4):
        found = lengths[order.ids(window * 100, 100)]
        ranks = np.argsort(np.argsort(found)).reshape(5, 20)
        parts = [part for row in ranks for part in np.split(row, [6, 12, 18])]
        assert all(sorted(part.tolist()) == list(range(part.min(), part.max() + 1)) for part in parts)
        shorter += [left.min() < right.min() for left, right in pairwise(parts)]
    assert 0.3 < np.mean(shorter) < 0.7, "short ones must not all come first"
    assert sorted(order.ids(0, 400).tolist()) == list(range(400))


def test_a_trace_agrees_with_the_order_in_both_directions(tmp_path: Path) -> None:
    prepare_rows(lambda: ({"tokens": [1] * (1 + n * 7 % 11), "n": n} for n in range(90)), str(tmp_path / "set"))
    dataset = ArrowDataset(str(tmp_path / "set"))
    folder, run = RunFolder(str(tmp_path / "mine")), config(batch=12, micro=3, batches=2)
    folder.storage.write(CONFIG, freeze(run).encode())
    write_record(folder, records_of(dataset, "tokens"))
    trace = Trace(folder)
    order = order_of(run, order_sources(records_of(dataset, "tokens")))
    steps = [trace.step(number) for number in range(1, 31)]
    assert [[visit.sample for visit in step] for step in steps] == order.ids(0, 360).reshape(30, 12).tolist()
    for sample in range(90):
        expected = [visit for step in steps for visit in step if visit.sample == sample]
        assert list(trace.visits(sample)) == expected


def test_lengths_are_those_of_the_column_and_what_has_none_is_refused(tmp_path: Path) -> None:
    prepare_rows(lambda: ({"tokens": [1] * (n % 5), "n": n} for n in range(12)), str(tmp_path / "set"))
    dataset = ArrowDataset(str(tmp_path / "set"))
    assert sample_lengths(dataset, "tokens").tolist() == [n % 5 for n in range(12)]
    mixed = Mixture([dataset, dataset], [Fraction(1, 4), Fraction(3, 4)])
    assert all(record.lengths is not None for record in records_of(mixed, "tokens"))
    for column, data in (("n", dataset), ("token", dataset), ("x", ArrayDataset({"x": np.zeros(3)}))):
        with pytest.raises(ConfigError, match=rf"order\.length_column={column}: the data has no column of that name"):
            sample_lengths(data, column)
    with pytest.raises(ValueError, match=r"order\.length_column.*order\.lanes=1"):
        OrderConfig(length_column="tokens", lanes=2)

"""The experiments that come with Everstep learn what they are there to learn, on real data."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from everstep.trainer.data import stdlib_subwords
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.reporting.sinks import read_metrics
from support.ranks import folder, train

pytestmark = pytest.mark.dist


def last(root: Path, metric: str) -> float:
    return float(list(read_metrics(folder(root), "evaluate").values())[-1][metric])


def few_sources(rank: int) -> None:
    """Leave this process each fourth file of the standard library."""
    every = stdlib_subwords.stdlib_sources
    stdlib_subwords.stdlib_sources = lambda: islice(every(), 0, None, 4)


@pytest.mark.parametrize(
    ("experiment", "least", "baseline"),
    [("digits", 0.97, 0.15), ("digits_vit", 0.95, 0.15), ("breast_cancer", 0.95, 0.7)],
)
def test_classifiers_reach_their_accuracy_on_held_out_data(
    tmp_path: Path, experiment: str, least: float, baseline: float
) -> None:
    ended = train(1, tmp_path, f"experiment={experiment}")
    assert ended.codes == [0], ended.printed
    assert last(tmp_path, "accuracy") >= least
    assert 0 < last(tmp_path, "baseline_accuracy") < baseline


def test_pictures_of_letters_find_names_that_were_never_seen(tmp_path: Path) -> None:
    ended = train(1, tmp_path, "experiment=glyphs", "steps=80", "evaluate.every=80")
    assert ended.codes == [0], ended.printed
    chance = last(tmp_path, "retrieval/baseline_recall_at_1")
    assert 0 < chance < 0.005
    assert last(tmp_path, "retrieval/recall_at_1") > 0.2
    assert last(tmp_path, "retrieval/recall_at_10") > 0.5


def test_a_model_of_subwords_beats_a_table_of_byte_pairs_by_half_a_bit(tmp_path: Path) -> None:
    words = ("experiment=gpt_bpe", "steps=60", "evaluate.every=60")
    ended = train(1, tmp_path, *words, before=few_sources)
    assert ended.codes == [0], ended.printed
    baseline = last(tmp_path, "baseline_bits_per_byte")
    assert 3.3 < baseline < 4  # 3.58 on all files
    assert last(tmp_path, "bits_per_byte") < baseline - 0.5


@pytest.mark.parametrize(
    ("experiment", "steps", "metric", "margin"),
    [
        ("documents", 100, "accuracy", 0.35),
        ("recommendation", 200, "recall_at_10", 0.05),
        ("forecasting", 150, "mase", -0.6),
    ],
)
def test_a_figure_beats_that_of_the_trivial_guess_beside_it(
    tmp_path: Path, experiment: str, steps: int, metric: str, margin: float
) -> None:
    ended = train(1, tmp_path, f"experiment={experiment}", f"steps={steps}", f"evaluate.every={steps}")
    assert ended.codes == [0], ended.printed
    found, trivial = last(tmp_path, metric), last(tmp_path, f"baseline_{metric}")
    assert found >= trivial + margin if margin > 0 else found <= trivial + margin
    assert f"baseline_{metric} {trivial:.4g}" in ended.printed


def bigram_bits(data: Path) -> float:
    """Bits per byte on held-out files of a table of byte pairs counted on the training files (add-one smoothed)."""
    counts = np.ones((256, 256))
    train_set, held_out = (ArrowDataset(str(data / part)) for part in ("train", "validation"))
    for dataset, into in ((train_set, counts),):
        blocks = dataset.take(np.arange(len(dataset)))["tokens"].numpy()
        np.add.at(into, (blocks[:, :-1].ravel(), blocks[:, 1:].ravel()), 1)
    blocks = held_out.take(np.arange(len(held_out)))["tokens"].numpy()
    chances = counts / counts.sum(axis=1, keepdims=True)
    return float(-np.log2(chances[blocks[:, :-1], blocks[:, 1:]]).mean())


def test_the_language_model_beats_a_bigram_table_on_held_out_files(tmp_path: Path) -> None:
    ended = train(2, tmp_path, "experiment=gpt_stdlib", "parallel=fsdp", "steps=300", "evaluate.every=300")
    assert ended.codes == [0, 0], ended.printed
    assert last(tmp_path, "bits_per_byte") < min(3.48, bigram_bits(tmp_path / "data/stdlib"))

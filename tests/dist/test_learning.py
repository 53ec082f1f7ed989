"""The experiments that come with Everstep learn what they are there to learn, on real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.reporting.sinks import read_metrics
from support.ranks import folder, train

pytestmark = pytest.mark.dist


def last(root: Path, metric: str) -> float:
    return float(list(read_metrics(folder(root), "evaluate").values())[-1][metric])


@pytest.mark.parametrize(("experiment", "least"), [("digits", 0.97), ("breast_cancer", 0.95)])
def test_classifiers_reach_their_accuracy_on_held_out_data(tmp_path: Path, experiment: str, least: float) -> None:
    ended = train(1, tmp_path, f"experiment={experiment}")
    assert ended.codes == [0], ended.printed
    assert last(tmp_path, "accuracy") >= least


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

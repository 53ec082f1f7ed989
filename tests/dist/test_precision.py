"""Half precision trains under every parallelism, and what it keeps besides weights survives a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tensor_index import read_metadata, read_whole
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_metrics
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist


def losses(root: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder(root)).values()]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full")
    assert train(1, root, "precision.dtype=fp32").codes == [0]
    return root


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp"), (2, "fsdp")])
def test_half_precision_follows_full_precision(full: Path, tmp_path: Path, dtype: str, world: int, kind: str) -> None:
    ended = train(world, tmp_path, f"parallel={kind}", f"precision.dtype={dtype}", "precision.init_scale=256")
    assert ended.codes == [0] * world, ended.printed
    assert losses(tmp_path) == pytest.approx(losses(full), rel=0.1)
    assert losses(tmp_path) != losses(full)


def test_the_loss_scale_survives_a_restart(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("precision.dtype=fp16", "precision.init_scale=1024", "precision.growth_interval=3")
    for root in (whole, parts):
        root.mkdir()
    assert train(2, whole, *options).codes == [0, 0]
    for steps in (5, 12):
        assert train(2, parts, *options, f"steps={steps}").codes == [0, 0]
    newest, other = locate(folder(parts).url), locate(folder(whole).url)
    assert list(differences(newest, other)) == []
    run, path = newest
    scale = read_whole(run.storage, path, read_metadata(run.storage, path), "scale.scale")
    assert float(scale) == 1024 * 2**4


def test_an_overflow_halves_the_scale_and_changes_nothing_else(tmp_path: Path) -> None:
    assert train(1, tmp_path, "precision.dtype=fp16", "precision.init_scale=1e38", "steps=2", "nonfinite.limit=9",
                 "checkpoint.every=1", "checkpoint.keep_last=9").codes == [0]  # fmt: skip
    url = folder(tmp_path).url
    first, second = (locate(f"{url}/checkpoints/step-{s:08d}-attempt-0001") for s in (1, 2))
    assert [d.name for d in differences(first, second)] == ["scale.scale"]


def test_early_stopping_counts_on_through_a_restart(tmp_path: Path) -> None:
    """With an unreachable min_delta only the first evaluation is better; the run ends after two more."""
    options = ("evaluate.every=2", "evaluate.patience=2", "evaluate.min_delta=1e9", "steps=12")
    assert train(1, tmp_path, *options, "stop.wall_time_s=0.001").codes == [75]
    ended = train(1, tmp_path, *options)
    assert ended.codes == [0], ended.printed
    assert list(ledger(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_the_best_checkpoint_is_kept_though_it_is_old(tmp_path: Path) -> None:
    assert train(1, tmp_path, "evaluate.every=1", "checkpoint.every=100", "checkpoint.keep_last=1", "optimizer.lr=0.3",
                 "steps=9").codes == [0]  # fmt: skip
    scores = {step: r["loss"] for step, r in read_metrics(folder(tmp_path), "evaluate").items()}
    best = min(scores, key=lambda step: scores[step])
    kept = sorted(p.name.split("-")[1] for p in (tmp_path / "toy/checkpoints").iterdir())
    assert kept == sorted({f"{best:08d}", "00000009"})

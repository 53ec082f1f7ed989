"""The world size appears in no sample order, no randomness and no loss."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import fontTools.ttLib  # noqa: F401  # forked ranks need not import these again
import PIL.ImageFont  # noqa: F401
import pytest
import sklearn.datasets  # noqa: F401
import torchmetrics  # noqa: F401

from everstep.trainer.data import stdlib_subwords
from everstep.trainer.reporting.sinks import read_metrics
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist
KINDS = [(1, "single"), (2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp"), (4, "hsdp")]


def losses(root: Path, run: str = "toy") -> list[float]:
    return [record["loss"] for record in read_metrics(folder(root, run)).values()]


def held_out(root: Path, run: str = "toy") -> list[float]:
    return [record["mae"] for record in read_metrics(folder(root, run), "evaluate").values()]


def scores(root: Path, run: str) -> dict[str, float]:
    (found,) = read_metrics(folder(root, run), "evaluate").values()
    return {name: value for name, value in found.items() if name not in ("kind", "step", "time")}


EXPERIMENTS = {
    "digits_vit": ("accuracy", ()),
    "gpt_bpe": ("bits_per_byte", ("model.width=16", "model.depth=1", "data.block=16", "data.vocab=300")),
    "glyphs": ("retrieval/recall_at_1", ("data.last_code=126",)),
}
"""Metric of each, and overrides that make it small."""


def few_sources(rank: int) -> None:
    """Leave this process each 30th file of the standard library."""
    every = stdlib_subwords.stdlib_sources
    stdlib_subwords.stdlib_sources = lambda: islice(every(), 0, None, 30)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    assert train(1, root).codes == [0]
    return root


@pytest.mark.parametrize(("world", "kind"), KINDS[1:])
def test_every_parallelism_gives_the_losses_of_one_process(alone: Path, tmp_path: Path, world: int, kind: str) -> None:
    ended = train(world, tmp_path, f"parallel={kind}")
    assert ended.codes == [0] * world, ended.printed
    assert len(losses(tmp_path)) == 12
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-9)
    assert held_out(tmp_path) == pytest.approx(held_out(alone), rel=1e-9)
    assert ledger(tmp_path) == ledger(alone)


def test_a_run_that_changes_its_world_at_each_resume_is_the_uninterrupted_run(alone: Path, tmp_path: Path) -> None:
    for steps, world in ((4, 1), (6, 3), (8, 2), (10, 4), (12, 3)):
        ended = train(world, tmp_path, f"steps={steps}", "evaluate.every=6", "checkpoint.every=2")
        assert ended.codes == [0] * world, ended.printed
    assert ledger(tmp_path) == ledger(alone)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-9)


def test_a_checkpoint_of_one_parallelism_restores_under_every_other(tmp_path: Path) -> None:
    """One run, whose every step is made by the next of them."""
    way = [*(kind for other in KINDS[1:] for kind in (other, KINDS[0])), *KINDS[1:]]
    assert train(1, tmp_path / "alone", f"steps={len(way)}").codes == [0]
    for step, (world, kind) in enumerate(way, start=1):
        ended = train(world, tmp_path, f"parallel={kind}", f"steps={step}")
        assert ended.codes == [0] * world, ended.printed
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "alone"), rel=1e-9)


@pytest.mark.parametrize(
    ("experiment", "smaller", "more"),
    [
        ("documents", ("model.width=16", "model.vocab=512", "data.path=documents"), ()),
        ("recommendation", (), ((3, "ddp", "model.sparse=true"),)),
        ("forecasting", (), ()),
    ],
)
def test_an_experiment_gives_the_same_samples_and_losses_on_any_world(
    tmp_path: Path, experiment: str, smaller: tuple[str, ...], more: tuple[tuple[int, str, str], ...]
) -> None:
    words = (f"experiment={experiment}", "precision=fp64", "steps=3", "log.every=1", "evaluate.every=3", *smaller)
    few = ("evaluate.limit=60", "global_batch=40", "micro_batch=8")
    for world, kind, *changed in ((1, "single"), (2, "fsdp"), (3, "ddp"), *more):
        run = f"{kind}-{len(changed)}"
        ended = train(world, tmp_path, *words, *few, f"parallel={kind}", *changed, run=run)
        assert ended.codes == [0] * world, ended.printed
        assert len(losses(tmp_path, run)) == 3
        assert losses(tmp_path, run) == pytest.approx(losses(tmp_path, "single-0"), rel=1e-9)
        assert scores(tmp_path, run) == pytest.approx(scores(tmp_path, "single-0"), rel=1e-9)
        assert ledger(tmp_path, run) == ledger(tmp_path, "single-0")


@pytest.mark.parametrize("changed", ["parallel.checkpoint_blocks=1", "parallel.compile=aot_eager"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_recomputing_and_compiling_change_no_loss(alone: Path, tmp_path: Path, changed: str, kind: str) -> None:
    ended = train(2, tmp_path, f"parallel={kind}", changed, "steps=3")
    assert ended.codes == [0, 0], ended.printed
    assert losses(tmp_path) == pytest.approx(losses(alone)[:3], rel=1e-9)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_the_same_on_any_number_of_processes(tmp_path: Path, experiment: str) -> None:
    metric, small = EXPERIMENTS[experiment]
    words = ("steps=3", "evaluate.every=3", "log.every=1", "global_batch=7", "micro_batch=2", "precision=fp64",
             "evaluate.limit=40", *small)  # fmt: skip
    found = {}
    for world, kind in KINDS[:5]:
        run = f"{kind}{world}"
        ended = train(world, tmp_path, f"experiment={experiment}", *words, f"parallel={kind}", run=run,
                      before=few_sources)  # fmt: skip
        assert ended.codes == [0] * world, ended.printed
        measured = [record[metric] for record in read_metrics(folder(tmp_path, run), "evaluate").values()]
        found[run] = ledger(tmp_path, run), losses(tmp_path, run), measured
    samples, trained, measured = found["single1"]
    assert len(trained) == 3
    assert len(measured) == 1
    for other in found.values():
        assert other[0] == samples
        assert other[1] == pytest.approx(trained, rel=1e-9)
        assert other[2] == pytest.approx(measured, rel=1e-9)

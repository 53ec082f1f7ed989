"""A loss over the whole global batch is the same on any number of processes and for any microbatch."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_metrics
from support.ranks import folder, train

pytestmark = pytest.mark.dist
PAIRS = ("task._target_=support.pairs.PairTask", "plugins=[support.toy,support.pairs]")


def figures(root: Path, run: str = "toy") -> list[tuple[float, float]]:
    return [(record["loss"], record["recall"]) for record in read_metrics(folder(root, run)).values()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    ended = train(1, root, *PAIRS)
    assert ended.codes == [0], ended.printed
    return root


@pytest.mark.parametrize(("world", "kind"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_every_parallelism_gives_the_losses_of_one_process(alone: Path, tmp_path: Path, world: int, kind: str) -> None:
    ended = train(world, tmp_path, *PAIRS, f"parallel={kind}")
    assert ended.codes == [0] * world, ended.printed
    assert len(figures(tmp_path)) == 12
    for found, wanted in zip(figures(tmp_path), figures(alone), strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)


def test_the_loss_and_its_gradient_do_not_depend_on_the_microbatch(tmp_path: Path) -> None:
    for size in (7, 3, 1):
        words = (*PAIRS, f"micro_batch={size}", "+task.dropout=0.0", "data._target_=support.toy.plain_data")
        assert train(1, tmp_path, *words, run=f"of{size}").codes == [0]
    for size in (3, 1):
        for found, wanted in zip(figures(tmp_path, f"of{size}"), figures(tmp_path, "of7"), strict=True):
            assert found == pytest.approx(wanted, rel=1e-9)


def test_a_run_that_changes_its_world_in_the_middle_is_the_uninterrupted_run(alone: Path, tmp_path: Path) -> None:
    assert train(3, tmp_path, *PAIRS, "steps=5", "checkpoint.every=5").codes == [0] * 3
    assert train(2, tmp_path, *PAIRS, "parallel=fsdp", "checkpoint.every=5").codes == [0] * 2
    for found, wanted in zip(figures(tmp_path), figures(alone), strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)


def test_a_resume_on_the_same_world_gives_the_bits_of_the_uninterrupted_run(tmp_path: Path) -> None:
    assert train(2, tmp_path, *PAIRS, run="whole").codes == [0] * 2
    for steps in ("steps=5", "steps=12"):
        assert train(2, tmp_path, *PAIRS, steps, run="parts").codes == [0] * 2
    assert list(differences(*(locate(folder(tmp_path, run).url) for run in ("whole", "parts")))) == []


def test_features_without_a_row_for_each_sample_are_refused_in_one_line(tmp_path: Path) -> None:
    ended = train(1, tmp_path, "task._target_=support.pairs.MistakenTask", *PAIRS[1:])
    assert ended.codes == [2]
    assert "task.features must return tensors [samples, …]" in ended.printed


def test_a_loss_that_uses_a_parameter_beside_the_features_is_refused_in_one_line(tmp_path: Path) -> None:
    words = ("task._target_=support.pairs.TemperatureTask", *PAIRS[1:], "checkpoint.self_test=false")
    ended = train(1, tmp_path, *words)
    assert ended.codes == [2]
    assert "task.batch_loss uses a parameter [] that is not in the features" in ended.printed

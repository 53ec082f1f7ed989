"""Optimizers as people bring them: wherever they keep their state, a resume goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.resume_checks import PLACES, assert_resumes, zoo

pytestmark = pytest.mark.dist

TORCH = (
    "AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop", "Adafactor",
)  # fmt: skip
OWN = (
    "Prodigy", "ScheduleFree", "Shampoo", "Attribute", "SharedState", "OwnStateDict", "MuonWithAdamW",
)  # fmt: skip


@pytest.mark.parametrize("optimizer", TORCH)
def test_each_optimizer_of_torch_resumes_to_the_bit(tmp_path: Path, optimizer: str) -> None:
    assert_resumes(1, tmp_path, "single", "optimizer=bare", f"optimizer._target_=torch.optim.{optimizer}")


@pytest.mark.parametrize(("world", "kind", "optimizer"), [
    (world, kind, optimizer)
    for world, kind in PLACES for optimizer in OWN if (kind, optimizer) != ("fsdp", "Shampoo")
])  # fmt: skip
def test_an_optimizer_of_somebody_resumes_to_the_bit(tmp_path: Path, world: int, kind: str, optimizer: str) -> None:
    assert_resumes(world, tmp_path, kind, "optimizer=bare", f"optimizer._target_=zoo.optimizers.{optimizer}")


def test_an_optimizer_that_mixes_shards_with_whole_tensors_ends_in_a_line_under_fsdp(tmp_path: Path) -> None:
    ended = zoo(2, tmp_path, "fsdp", "optimizer=bare", "optimizer._target_=zoo.optimizers.Shampoo")
    assert ended.codes != [0, 0]
    assert "got mixed torch.Tensor and DTensor" in ended.printed
    assert "Traceback" not in ended.printed


def test_a_muon_resumes_where_the_model_has_matrices_alone(tmp_path: Path) -> None:
    given = ("optimizer=bare", "optimizer._target_=torch.optim.Muon", "model._target_=zoo.models.Matrices")
    assert_resumes(1, tmp_path, "single", *given)


@pytest.mark.parametrize(("world", "optimizer", "said"), [
    (1, "Unsavable", "lock is a builtins.object"),
    (2, "PerRank", "the ranks hold different values of optimizer."),
])  # fmt: skip
def test_state_that_a_checkpoint_cannot_hold_is_refused_at_the_first_step(
    tmp_path: Path, world: int, optimizer: str, said: str
) -> None:
    ended = zoo(world, tmp_path, "ddp", "optimizer=bare", f"optimizer._target_=zoo.optimizers.{optimizer}")
    assert ended.codes == [2] * world, ended.printed
    assert said in ended.printed

"""A new run takes the weights of another: all, or those that patterns name; what does not fit is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from everstep.config import RunConfig
from everstep.errors import CheckpointError, ConfigError
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.weights import load_weights
from support.saved_checkpoint import saved


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def zeros(**shapes: tuple[int, ...]) -> nn.ParameterDict:
    """A model of such weights, all zero."""
    return nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})


def test_all_weights_come_by_default(run: RunFolder) -> None:
    checkpoints, path = saved(run)
    tensors = zeros(weight=(2, 3), bias=(2,))
    assert load_weights(run.url, tensors, checkpoints.mesh) == f"{run.url}/{path}: 2 of 2 weights"
    for name, value in checkpoints.state.model.state_dict().items():
        assert torch.equal(tensors[name], value)


def test_only_what_a_pattern_names_comes_and_the_line_says_what_did_not(run: RunFolder) -> None:
    checkpoints, path = saved(run)
    tensors = zeros(weight=(2, 3), bias=(7,), head=(4,))
    line = load_weights(run.url, tensors, checkpoints.mesh, ["wei*"])
    assert line == f"{run.url}/{path}: 1 of 3 weights; not taken: bias, head; left there: bias"
    assert torch.equal(tensors["weight"], checkpoints.state.model.state_dict()["weight"])
    assert not tensors["bias"].any()
    assert not tensors["head"].any()


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"weight": (2, 3), "head": (4,)}, r"model\.head is missing there, \[4\] in the model; .* init_match"),
        ({"weight": (5, 3)}, r"model\.weight is \[2, 3\] there, \[5, 3\] in the model"),
    ],
)
def test_what_is_asked_for_and_does_not_fit_is_refused_and_changes_nothing(
    run: RunFolder, shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    checkpoints, _ = saved(run)
    tensors = zeros(**shapes)
    with pytest.raises(CheckpointError, match=said):
        load_weights(run.url, tensors, checkpoints.mesh)
    assert not any(tensor.any() for tensor in tensors.values())


def test_a_pattern_that_names_nothing_is_a_mistake(run: RunFolder) -> None:
    checkpoints, _ = saved(run)
    with pytest.raises(ConfigError, match=r"init_match: 'encoder\.\*' matches no weight .* has bias, weight"):
        load_weights(run.url, zeros(weight=(2, 3), bias=(2,)), checkpoints.mesh, ["weight", "encoder.*"])


def test_patterns_without_a_source_or_none_at_all_are_mistakes() -> None:
    with pytest.raises(ValueError, match="nothing to take while init_from is null"):
        RunConfig(init_match=["a"])
    with pytest.raises(ValueError, match="at least one pattern"):
        RunConfig(init_from="runs/a", init_match=[])

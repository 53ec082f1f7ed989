"""Attributions: exact for a linear model, complete for others, refused where there is nothing to attribute to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.explanation.attribution import METHODS, Attribution, attribute
from everstep.trainer.explanation.explain import _refuse_nonfinite
from everstep.trainer.explanation.model_inputs import model_inputs
from everstep.trainer.explanation.target import scores, targets
from everstep.trainer.models.mlp import MLP
from everstep.trainer.tasks.recommendation import MatrixFactorization


def explained(model: nn.Module, method: str, **arguments: Tensor) -> list[Attribution]:
    count = len(next(iter(arguments.values())))
    target = targets(scores(model(**arguments)), 1)
    return [attribute(model, arguments, each, target, method, 64) for each in model_inputs(model, arguments, count)]


@pytest.mark.parametrize("method", METHODS)
def test_attributions_of_a_linear_model_are_weight_times_input(method: str) -> None:
    torch.manual_seed(0)
    model, given = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    (found,) = explained(model, method, input=given)
    assert (found.values - model.weight[1] * given).abs().max() <= 1e-6
    assert found.baseline_output == pytest.approx([model.bias[1].item()] * 4)
    assert found.delta.abs().max() <= 1e-6


def test_integrated_gradients_of_a_network_add_up_to_the_change_of_its_output() -> None:
    torch.manual_seed(0)
    model, given = MLP(6, 3).double().eval(), torch.randn(4, 6, dtype=torch.float64)
    (found,) = explained(model, "integrated_gradients", features=given)
    change = model(given)[:, 1] - model(torch.zeros_like(given))[:, 1]
    assert found.values.sum(dim=1).tolist() == pytest.approx(change.tolist(), abs=1e-6)
    (gradient,) = explained(model, "gradient_x_input", features=given)
    assert gradient.delta.abs().max() > 1e-3  # it is not complete, and says so


@pytest.mark.parametrize("method", METHODS)
def test_integers_are_explained_by_their_embedding(method: str) -> None:
    torch.manual_seed(0)
    model = MatrixFactorization(7, 5, width=4).double()
    user = torch.tensor([2, 6])
    (found,) = explained(model, method, user=user)
    wanted = (model.users.weight[user] * model.items.weight[1]).sum(dim=1)
    assert found.values.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


class Counted(nn.Module):
    def forward(self, numbers: Tensor) -> Tensor:
        return numbers.double()


def test_integers_without_an_embedding_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no input of the model has gradients .*numbers \(int64\)"):
        explained(Counted(), "occlusion", numbers=torch.ones(3, 2, dtype=torch.int64))


def test_an_output_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--target 3: the model has 3 outputs \(0 to 2\)"):
        targets(torch.zeros(2, 3), 3)
    with pytest.raises(ConfigError, match="the model returns list"):
        scores([torch.zeros(2, 3)])


@pytest.mark.parametrize("part", ["values", "output"])
def test_nan_in_an_attribution_or_an_output_is_refused_with_its_sample(part: str) -> None:
    whole = {"values": torch.ones(2, 3), "output": torch.ones(2)}
    whole[part][1] = float("nan")
    found = Attribution("x", torch.ones(2, 3), whole["values"], whole["output"], torch.zeros(2))
    with pytest.raises(ConfigError, match="--samples 17: the model's output, or its gradient by x, is NaN or Inf"):
        _refuse_nonfinite([3, 17], [found])

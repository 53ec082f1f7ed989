"""The task of `everstep.train(model=…, loss=…)`: a loss is a mean over the samples or one value per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep.errors import ConfigError
from everstep.tasks import Supervised

BATCH = {
    "features": torch.arange(24, dtype=torch.float32).reshape(8, 3) / 24,
    "target": torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]),
}


def loss_of(measure: Callable[..., Tensor], batch: dict[str, Tensor] = BATCH) -> Any:
    torch.manual_seed(0)
    task = Supervised(lambda: nn.Linear(3, 2), measure)
    return task.loss(task.model(), batch)


def test_a_mean_and_one_value_per_sample_give_the_same_sum() -> None:
    mean, each = loss_of(nn.CrossEntropyLoss()), loss_of(nn.CrossEntropyLoss(reduction="none"))
    assert mean.count == each.count == 8
    assert mean.sum.item() == pytest.approx(each.sum.item(), rel=1e-6)


@pytest.mark.parametrize(
    "measure",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0])),
        nn.CrossEntropyLoss(ignore_index=0),
    ],
    ids=["sum", "weights", "ignored"],
)
def test_a_loss_that_is_no_mean_over_the_samples_is_refused_with_what_to_write(measure: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no mean over the samples .* reduction='none'"):
        loss_of(measure)


def test_other_shapes_and_missing_columns_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"loss returned the shape \[8, 2\]"):
        loss_of(lambda output, target: F.one_hot(target) - output)
    with pytest.raises(ConfigError, match="the data has no such column, but features"):
        loss_of(F.cross_entropy, {"features": BATCH["features"]})

"""Parameter groups by name: rates, decay and freezing by pattern, and each mistake in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from everstep.errors import ConfigError
from everstep.trainer.optim import build_optimizer
from everstep.trainer.param_groups import frozen_model
from support.toy import ToyTask

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.5, "weight_decay": 0.1}


def optimizer(model: nn.Module, *groups: Any, **node: Any) -> torch.optim.Optimizer:
    return build_optimizer({**ADAMW, **node, "groups": list(groups)}, model, ["test_optim", "test_param_groups"])


def found(model: nn.Module, *groups: Any) -> dict[str, tuple[float, float]]:
    """Rate and decay of each parameter."""
    kinds = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer(model, *groups).param_groups
        for p in group["params"]
    }
    return {name: kinds[id(p)] for name, p in model.named_parameters() if id(p) in kinds}


def test_a_group_has_its_own_rate_and_decay_and_the_others_stay_as_they_were() -> None:
    model = ToyTask().model()
    kinds = found(model, {"match": "head.*", "lr_scale": 10, "weight_decay": 0.01})
    assert kinds["head.weight"] == kinds["head.bias"] == (5.0, 0.01)
    assert kinds["blocks.0.linear.weight"] == (0.5, 0.1)
    assert kinds["blocks.0.linear.bias"] == (0.5, 0.0)


def test_a_group_without_a_decay_leaves_norms_and_biases_without_one() -> None:
    kinds = found(ToyTask().model(), {"match": "blocks.*", "lr_scale": 0.5})
    assert kinds["blocks.1.linear.weight"] == (0.25, 0.1)
    assert kinds["blocks.1.norm.weight"] == kinds["blocks.1.linear.bias"] == (0.25, 0.0)


def test_a_frozen_group_is_not_trained_and_has_no_state() -> None:
    node = {**ADAMW, "groups": [{"match": "blocks.0.*", "frozen": True}]}
    model = frozen_model(ToyTask().model, node)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        n for n, _ in model.named_parameters() if n.startswith("blocks.0.")
    ]
    trained = {id(p) for group in build_optimizer(node, model, ()).param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_tied_weight_is_found_by_each_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    assert found(model, {"match": "head.*", "lr_scale": 2}) == {"embed.weight": (1.0, 0.1)}
    with pytest.raises(ConfigError, match=r"head\.weight is matched by 'embed\.\*' and by 'head\.\*'"):
        found(model, {"match": "embed.*"}, {"match": "head.*"})


@pytest.mark.parametrize(("groups", "said"), [
    ([{"match": "haed.*"}], r"'haed\.\*' matches no parameter; did you mean 'head\.\*'\?; the model has blocks"),
    ([{"match": "head.weigth"}], r"matches no parameter; did you mean 'head\.weight'\?"),
    ([{"match": "head.*"}, {"match": "*.bias"}], r"head\.bias is matched by 'head\.\*' and by '\*\.bias'; let one"),
    ([{"match": "head.*"}, {"match": "head.*"}], r"is matched by 'head\.\*' and by 'head\.\*'"),
    ([{"match": "*", "lr": 1}], r"groups\[0\] has no key 'lr'.*; there are match, lr_scale, weight_decay, frozen"),
    ([{"match": "*", "lr_scale": -1}], r"groups\[0\]\.lr_scale=-1: must be a finite number ≥ 0"),
    ([{"match": "*", "weight_decay": float("nan")}], r"weight_decay=nan: must be a finite number"),
    ([{"match": "*", "frozen": "yes"}], r"frozen='yes': must be true or false"),
    ([{"match": "*", "frozen": True, "lr_scale": 2}], r"lr_scale=2: a frozen group is not trained; leave it out"),
    ([{"lr_scale": 2}], r"groups\[0\]\.match=None: must be a pattern"),
    (["head.*"], r"must be a list of groups; write"),
])  # fmt: skip
def test_a_mistake_in_a_group_is_one_line_with_what_to_write(groups: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        optimizer(ToyTask().model(), *groups)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("target", "group", "said"), [
    ("test_optim.Layered", {"match": "head.*", "lr_scale": 2}, "Layered makes groups of its own"),
    ("test_optim.Layered", {"match": "head.*", "weight_decay": 0.5}, "Layered makes groups of its own"),
])  # fmt: skip
def test_an_optimizer_that_mixes_the_groups_is_refused(target: str, group: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optimizer(ToyTask().model(), group, _target_=target)


def test_a_decay_for_an_optimizer_without_one_is_refused() -> None:
    node = {"_target_": "torch.optim.Rprop", "groups": [{"match": "head.*", "weight_decay": 0.5}]}
    with pytest.raises(ConfigError, match="Rprop has no weight_decay; leave it out of the groups"):
        build_optimizer(node, ToyTask().model(), ())


def test_everything_frozen_is_refused() -> None:
    node = {**ADAMW, "groups": [{"match": "*", "frozen": True}]}
    with pytest.raises(ConfigError, match=r"no parameters to train; change model, task or optimizer\.groups"):
        build_optimizer(node, frozen_model(ToyTask().model, node), ())

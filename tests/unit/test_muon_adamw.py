"""Muon for matrices of hidden layers and AdamW for the rest: the steps of torch's two optimizers, in one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from everstep.errors import ConfigError
from everstep.trainer.models.gpt import GPT
from everstep.trainer.optim import build_optimizer
from everstep.trainer.optimizers.muon_adamw import muon_fact

NODE = {"_target_": "everstep.optimizers.MuonAdamW", "lr": 0.01, "weight_decay": 0.1}


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()


def matrices(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    mine = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in mine}


def test_its_steps_are_those_of_torchs_muon_and_adamw() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    other = copy.deepcopy(model)
    one = build_optimizer(NODE, model, ())
    hidden = [other[0].weight, other[1].weight]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    biases = {"params": [layer.bias for layer in other], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([{"params": [other[2].weight]}, biases], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        step(model, one)
        step(other, muon, adamw)
    for mine, torchs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=0, atol=1e-7)


def test_embeddings_the_head_and_vectors_are_adamws_and_the_first_lines_say_so() -> None:
    model = GPT(width=8, depth=1, heads=2, context=4)
    optimizer = build_optimizer(NODE, model, ())
    assert matrices(model, optimizer) == {
        name for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2
    }
    assert muon_fact(optimizer, model) == {
        "muon": "4 matrices; adamw: embedding.tokens.weight, embedding.positions.weight, head.weight, vectors"
    }


def test_patterns_name_other_matrices_in_place_of_the_head() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    assert matrices(model, build_optimizer({**NODE, "adamw": ["0.*"]}, model, ())) == {"1.weight", "2.weight"}
    with pytest.raises(ConfigError, match=r"adamw: '0\.wight' matches no parameter; did you mean '0\.weight'"):
        build_optimizer({**NODE, "adamw": ["0.wight"]}, model, ())


def test_groups_by_name_scale_both_halves() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    optimizer = build_optimizer({**NODE, "muon_lr": 0.02, "groups": [{"match": "0.*", "lr_scale": 10}]}, model, ())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found == pytest.approx(
        {"0.weight": 0.2, "0.bias": 0.1, "1.weight": 0.02, "1.bias": 0.01, "2.weight": 0.01, "2.bias": 0.01}
    )


def test_a_state_dict_of_torchs_form_loads_again() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    one, other = build_optimizer(NODE, model, ()), build_optimizer(NODE, copy.deepcopy(model), ())
    step(model, one)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    twin = nn.ParameterList([p for group in other.param_groups for p in group["params"]])
    with torch.no_grad():
        for mine, theirs in zip((p for g in one.param_groups for p in g["params"]), twin, strict=True):
            theirs.copy_(mine)
            theirs.grad = mine.grad = torch.ones_like(mine)
    one.step()
    other.step()
    for mine, theirs in zip((p for g in one.param_groups for p in g["params"]), twin, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("key", "value", "said"), [
    ("momentum", 1.0, r"optimizer\.momentum=1\.0: must be in \[0, 1\)"),
    ("ns_steps", 0, r"optimizer\.ns_steps=0: must be in 1 to 99"),
])  # fmt: skip
def test_a_value_out_of_range_is_one_line(key: str, value: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_optimizer({**NODE, key: value}, nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), ())


def test_a_model_without_hidden_matrices_is_told_to_take_adamw() -> None:
    with pytest.raises(ConfigError, match="no matrices of hidden layers for Muon; choose optimizer=adamw"):
        build_optimizer(NODE, nn.Linear(4, 6), ())

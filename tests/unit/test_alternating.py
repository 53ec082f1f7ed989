"""Optimizers that take turns are the same steps as those of a loop with two optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from everstep.errors import ConfigError
from everstep.optimizers import Alternating
from everstep.trainer.optim import build_optimizer
from everstep.trainer.optimizers.alternating import turns_fact
from everstep.trainer.param_groups import frozen_model
from support.adversaries import Adversaries

CRITIC = {"match": "critic.*", "_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1}
GENERATOR = {"match": "generator.*", "_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
TURNS = ["critic", "critic", "generator"]


def node(*, turns: Any = TURNS, groups: Any = None, **optimizers: Any) -> dict[str, Any]:
    given = {"_target_": "everstep.optimizers.Alternating", "optimizers": optimizers, "turns": turns}
    return given if groups is None else {**given, "groups": groups}


def built(model: nn.Module, given: dict[str, Any]) -> Alternating:
    optimizer = build_optimizer(given, model, ("test_alternating",))
    assert isinstance(optimizer, Alternating)
    return optimizer


def gradients(model: nn.Module, step: int) -> None:
    """Give all parameters gradients, of both networks."""
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_its_steps_are_those_of_a_loop_with_two_optimizers() -> None:
    model = Adversaries(0.0)
    other = copy.deepcopy(model)
    both = built(model, node(critic=CRITIC, generator=GENERATOR))
    kinds = [[p for p in other.critic.parameters() if (p.dim() >= 2) is matrix] for matrix in (True, False)]
    groups = [{"params": kinds[0]}, {"params": kinds[1], "weight_decay": 0.0}]
    apart = {
        "critic": torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=True),
        "generator": torch.optim.SGD(other.generator.parameters(), lr=0.1, momentum=0.9, fused=True),
    }
    for step in range(1, 8):
        gradients(model, step)
        gradients(other, step)
        both.keep(step)
        both.step()
        apart[TURNS[(step - 1) % 3]].step()
        for one, wanted in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, wanted)


def test_parameters_and_state_of_the_other_turns_stay_as_they_are() -> None:
    model = Adversaries(0.0)
    both = built(model, node(critic=CRITIC, generator={**CRITIC, "match": "generator.*"}))
    for step in range(1, 7):
        turn = both.turn(step)
        kept = {name: [p.detach().clone() for p in both.parameters(name)] for name in both.names}
        state = {id(p): {k: v.clone() for k, v in both.state[p].items()} for p in model.parameters() if p in both.state}
        gradients(model, step)
        both.keep(step)
        both.step()
        for name in both.names:
            assert all(map(torch.equal, both.parameters(name), kept[name])) is (name != turn)
        for parameter in both.parameters("generator" if turn == "critic" else "critic"):
            before = state.get(id(parameter), {})
            assert both.state.get(parameter, {}).keys() == before.keys()
            assert all(torch.equal(both.state[parameter][key], value) for key, value in before.items())


def test_the_turn_is_a_function_of_the_step() -> None:
    both = built(Adversaries(0.0), node(critic=CRITIC, generator=GENERATOR))
    assert [both.turn(step) for step in (1, 2, 3, 4, 6, 3_000_000)] == [
        "critic", "critic", "generator", "critic", "generator", "generator",
    ]  # fmt: skip
    assert turns_fact(both) == {"turns": "2 × critic, generator; critic trains 8 tensors, generator trains 8 tensors"}


def test_a_state_that_torch_loads_goes_on_where_it_was() -> None:
    models = [Adversaries(0.0) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (built(model, node(critic=CRITIC, generator=GENERATOR)) for model in models)
    for step in range(1, 4):
        gradients(models[0], step)
        first.keep(step)
        first.step()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second), strict=True):
        for step in range(4, 8):
            gradients(model, step)
            optimizer.keep(step)
            optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_groups_scale_and_freeze_the_parameters_of_each() -> None:
    groups = [{"match": "critic.2.*", "lr_scale": 10}, {"match": "generator.0.*", "frozen": True}]
    given = node(critic=CRITIC, generator=GENERATOR, groups=groups)
    model = frozen_model(lambda: Adversaries(0.0), given)
    rates = {id(p): group["lr"] for group in built(model, given).param_groups for p in group["params"]}
    named = {name: rates.get(id(p)) for name, p in model.named_parameters()}
    found = [named[name] for name in ("critic.2.weight", "critic.0.weight", "generator.0.weight", "generator.2.weight")]
    assert found == [pytest.approx(0.1), 0.01, None, 0.1]


def test_a_step_without_a_gradient_in_its_turn_is_refused() -> None:
    model = Adversaries(0.0)
    both = built(model, node(critic=CRITIC, generator=GENERATOR))
    for parameter in model.critic.parameters():
        parameter.grad = torch.zeros_like(parameter)
    both.check_gradients(1)
    with pytest.raises(ConfigError, match="step 3 is the turn of 'generator', and none of its parameters got"):
        both.check_gradients(3)


class CountsBeside(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["steps"] = self.state.get("steps", 0) + 1  # type: ignore[index, call-overload]


class TwoModes(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize(("given", "said"), [
    (node(critic=CRITIC), r"none trains generator\.0\.weight and 7 more; match it in one of critic, or freeze it"),
    (node(critic={**CRITIC, "match": ["critic.*", "generator.0.*"]}, generator=GENERATOR),
     r"generator\.0\.weight is matched by critic and by generator"),
    (node(critic={**CRITIC, "match": None}, generator=GENERATOR), r"critic\.match=None: must be a pattern"),
    (node(critic={"match": "critic.*"}, generator=GENERATOR), r"optimizers\.critic has no _target_"),
    (node(critic=CRITIC, generator=GENERATOR, turns="critic"), r"turns='critic': must be a list of names"),
    (node(critic=CRITIC, generator=GENERATOR, turns=None), r"turns=None: must be a list of names"),
    (node(critic=CRITIC, generator=GENERATOR, turns=["critic", "generate"]), r"no optimizer 'generate'; did you mean"),
    (node(critic=CRITIC, generator=GENERATOR, turns=["critic"]), r"'generator' has no turn; add it"),
    (node(turns=[]), r"optimizer\.optimizers=\{\}: must name at least one optimizer"),
    ({**node(critic=CRITIC, generator=GENERATOR), "turn": []}, r"optimizer\.turn=\[\]: .*; did you mean 'turns'"),
    (node(critic={**CRITIC, "_target_": "test_alternating.TwoModes"}, generator=GENERATOR), r"TwoModes switches"),
    (node(critic={**CRITIC, "_target_": "torch.nn.Linear"}, generator=GENERATOR), r"optimizers\.critic"),
])  # fmt: skip
def test_a_mistake_is_one_line_with_what_to_write(given: dict[str, Any], said: str) -> None:
    turns = {**given, "turns": ["critic"]} if said.startswith("none trains") else given
    with pytest.raises(ConfigError, match=said) as caught:
        built(Adversaries(0.0), turns)
    assert "\n" not in str(caught.value)


def test_an_optimizer_whose_state_belongs_to_no_parameter_is_refused() -> None:
    model = Adversaries(0.0)
    critic = {"match": "critic.*", "_target_": "test_alternating.CountsBeside", "lr": 0.1}
    both = built(model, node(critic=critic, generator=GENERATOR))
    gradients(model, 1)
    with pytest.raises(ConfigError, match="CountsBeside keeps state that belongs to no parameter"):
        both.step()


def test_a_step_with_nan_is_passed_over_by_fused_and_other_optimizers() -> None:
    model = Adversaries(0.0)
    other = {**GENERATOR, "_target_": "torch.optim.RMSprop", "momentum": 0.0}
    both = built(model, node(critic=CRITIC, generator=other))
    gradients(model, 1)
    kept = [p.detach().clone() for p in model.parameters()]
    both.found_inf = torch.ones(())  # type: ignore[attr-defined]
    both.step()
    assert all(map(torch.equal, model.parameters(), kept))
    both.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    both.step()
    assert not any(map(torch.equal, model.parameters(), kept))

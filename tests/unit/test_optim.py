"""The learning rate as a pure function of the step, the parameter groups, and the average of the weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from everstep.config import ScheduleConfig, Shape
from everstep.errors import ConfigError
from everstep.trainer.optim import WeightEma, build_optimizer, group_facts, set_lr
from everstep.trainer.schedule import curve_of, lr_factor
from support.toy import EmptyTask, ToyTask

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.5, "weight_decay": 0.1}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.5}


def factors(shape: Shape, *steps: int, warmup: int = 10, of: int = 110, low: float = 0.2) -> list[float]:
    schedule = ScheduleConfig(shape=shape, warmup_steps=warmup, final_fraction=low, decay_fraction=0.4)
    return [lr_factor(step, of, schedule, curve_of(schedule, ())) for step in steps]


@pytest.mark.parametrize("shape", list(Shape))
def test_the_rate_rises_to_its_highest_in_equal_steps(shape: Shape) -> None:
    assert factors(shape, 1, 2, 5, 10) == [0.1, 0.2, 0.5, 1.0]


@pytest.mark.parametrize("shape", list(Shape))
def test_without_warm_up_the_first_step_has_nearly_the_highest_rate(shape: Shape) -> None:
    assert factors(shape, 1, warmup=0, of=1000)[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "middle", "three_quarters"),
    [(Shape.constant, 1, 1), (Shape.cosine, 0.6, 0.3171573), (Shape.linear, 0.6, 0.4), (Shape.wsd, 1, 0.7)],
)
def test_each_curve_passes_through_its_known_points(shape: Shape, middle: float, three_quarters: float) -> None:
    end = 1 if shape is Shape.constant else 0.2
    assert factors(shape, 60, 85, 110) == pytest.approx([middle, three_quarters, end])


@pytest.mark.parametrize("shape", list(Shape))
def test_past_its_span_the_curve_stays_where_it_ended(shape: Shape) -> None:
    assert len(set(factors(shape, 110, 111, 5000))) == 1


def test_the_rate_does_not_fall_before_the_last_part_of_wsd() -> None:
    assert factors(Shape.wsd, 11, 50, 70) == pytest.approx([1, 1, 1])
    assert factors(Shape.wsd, 71)[0] < 1


@given(
    shape=st.sampled_from(list(Shape)),
    warmup=st.integers(0, 200),
    steps=st.integers(1, 500),
    low=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_curve_is_continuous_and_between_its_ends(
    shape: Shape, warmup: int, steps: int, low: float, decay: float
) -> None:
    schedule = ScheduleConfig(shape=shape, warmup_steps=warmup, final_fraction=low, decay_fraction=decay)
    curve = curve_of(schedule, ())
    values = [lr_factor(step, steps, schedule, curve) for step in range(1, steps + warmup + 3)]
    span = max(1, steps - warmup)
    steepest = max(1 / max(1, warmup), 1.6 * (1 - low) / span, (1 - low) / (decay * span))
    assert all(0 < value <= 1 for value in values[:warmup])
    assert all(low - 1e-9 <= value <= 1 for value in values[warmup:])
    assert all(abs(after - before) <= steepest + 1e-9 for before, after in itertools.pairwise(values))
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


def test_setting_the_rate_scales_each_groups_own() -> None:
    optimizer = build_optimizer(SGD, ToyTask().model(), ())
    optimizer.param_groups[0]["peak_lr"] = 2.0
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]


@pytest.mark.parametrize("node", [ADAMW, {"_target_": "torch.optim.AdamW"}], ids=["said", "left to torch"])
def test_norms_and_biases_do_not_decay_and_matrices_do(node: dict[str, object]) -> None:
    model = ToyTask().model()
    decays = {id(p): group["weight_decay"] for group in build_optimizer(node, model, ()).param_groups
              for p in group["params"]}  # fmt: skip
    for name, parameter in model.named_parameters():
        assert (decays[id(parameter)] > 0) == (name.endswith("linear.weight") or name == "head.weight"), name


class Layered(torch.optim.AdamW):
    """Makes groups of its own, of which the first parameter may be a norm's."""

    def __init__(self, params: list[dict[str, object]], lr: float, weight_decay: float) -> None:
        flat = [p for group in params for p in group["params"]]  # type: ignore[attr-defined]
        super().__init__([{"params": sorted(flat, key=lambda p: p.dim()), "lr": lr}], weight_decay=weight_decay)


def test_an_optimizer_that_makes_its_own_groups_keeps_their_decay() -> None:
    model = ToyTask().model()
    optimizer = build_optimizer({**ADAMW, "_target_": "test_optim.Layered"}, model, ["test_optim"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]
    assert group_facts(optimizer, model) == {"weight decay": "0.1"}


def test_what_does_not_decay_is_told_by_kind_and_rates_that_differ_too() -> None:
    model = ToyTask().model()
    optimizer = build_optimizer(ADAMW, model, ())
    none = "*.norm.weight, *.bias"
    assert group_facts(optimizer, model) == {"weight decay": f"0.1; none for {none}"}
    optimizer.param_groups[1]["peak_lr"] = 0.25
    assert group_facts(optimizer, model)["lr"] == "0.25 to 0.5, by group; that of the first is logged"
    assert group_facts(build_optimizer(SGD, model, ()), model) == {}
    model.blocks[1].norm.weight = nn.Parameter(torch.ones(6, 1))  # a name of two kinds
    model.head.bias = nn.Parameter(torch.ones(1, 1))
    told = group_facts(build_optimizer(ADAMW, model, ()), model)["weight decay"]
    assert told == "0.1; none for blocks.*.norm.weight, *.norm.bias, *.linear.bias"


def test_what_is_frozen_is_left_out() -> None:
    model = ToyTask().model()
    model.head.requires_grad_(False)
    groups = build_optimizer(ADAMW, model, ()).param_groups
    assert not {id(p) for p in model.head.parameters()} & {id(p) for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    ("node", "fused"),
    [
        (ADAMW, True),
        ({**ADAMW, "_target_": "torch.optim.Adam"}, True),
        (SGD, True),
        ({**ADAMW, "fused": False}, False),
        ({"_target_": "torch.optim.RMSprop"}, None),
    ],
)
def test_an_optimizer_is_fused_where_it_can_be_and_the_user_does_not_say_no(
    node: dict[str, object], fused: bool | None
) -> None:
    assert build_optimizer(node, ToyTask().model(), ()).defaults.get("fused") is fused


@pytest.mark.parametrize(("task", "optimizer"), [(EmptyTask(), ADAMW), (EmptyTask(), SGD)])
def test_a_model_without_parameters_is_refused(task: EmptyTask, optimizer: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no parameters to train; change model, task or"):
        build_optimizer(optimizer, task.model(), ())


def test_a_model_that_is_wholly_frozen_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameters to train"):
        build_optimizer(ADAMW, nn.Linear(2, 2).requires_grad_(False), ())


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({**ADAMW, "learning_rate": 1}, "torch.optim.AdamW takes no 'learning_rate'; did you mean 'optimizer.lr'?"),
        ({**ADAMW, "lr": -1.0}, "optimizer (torch.optim.AdamW): Invalid learning rate: -1.0"),
        ({"_target_": "torch.optim.AdamWW"}, "did you mean 'AdamW'?"),
        ({"_target_": "torch.nn.ReLU"}, "'torch.nn.ReLU' is not an optimizer"),
    ],
)
def test_a_wrong_optimizer_is_said_in_one_line(node: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_optimizer(node, ToyTask().model(), ())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_average_moves_by_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = WeightEma(model, 0.9)
        for value, expected in ((2.0, 1.1), (3.0, 1.29), (0.0, 1.161)):
            model.weight.fill_(value)
            average.update()
            assert average.shadow["weight"].item() == pytest.approx(expected)


def test_the_average_leaves_out_what_is_frozen() -> None:
    model = ToyTask().model()
    model.head.weight.requires_grad_(False)
    assert "head.weight" not in WeightEma(model, 0.5).shadow


def test_swapping_twice_puts_weights_and_average_back_to_the_bit() -> None:
    torch.manual_seed(0)
    model = ToyTask().model()
    average = WeightEma(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    average.update()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    shadow = {name: value.clone() for name, value in average.shadow.items()}
    average.swap()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, shadow[name])
        assert torch.equal(average.shadow[name], weights[name])
    average.swap()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(average.shadow[name], shadow[name])

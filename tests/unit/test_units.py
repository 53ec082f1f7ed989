"""The units that FSDP shards and activation checkpointing recomputes: found, or named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everstep.config import ParallelConfig
from everstep.errors import ConfigError
from everstep.trainer.distributed.model_factory import prepare_units
from everstep.trainer.distributed.sharding import describe_units, find_units, shardable_units


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Layer(), Layer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Encoder(nn.Module):
    """Named as Hugging Face's BERT is."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Linear(4, 4)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(x)
        for layer in self.encoder.layer:
            x = layer(x)
        return x


def test_repeated_blocks_are_found_wherever_they_are() -> None:
    assert list(find_units(Encoder())) == ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]
    assert list(find_units(nn.Sequential(nn.Linear(4, 4), Layer(), Layer()))) == ["1", "2"]


def test_the_outermost_repetition_is_taken() -> None:
    assert list(find_units(nn.ModuleList([Stage(), Stage()]))) == ["0", "1"]


def test_layers_without_modules_of_their_own_are_no_units() -> None:
    assert find_units(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == {}


def test_a_layer_that_stands_in_several_places_is_no_unit() -> None:
    layer = Layer()
    assert find_units(nn.Sequential(layer, layer)) == {}


@pytest.mark.parametrize(("wrap", "found"), [
    (["Layer"], 3), (["encoder.layer.*"], 6), (["encoder.layer.[01]"], 2), (["Linear"], 4),
    ([f"{Layer.__module__}.Layer", "embeddings"], 4),
])  # fmt: skip
def test_units_are_named_by_class_or_path(wrap: list[str], found: int) -> None:
    assert len(find_units(Encoder(), wrap)) == found


def test_a_name_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"parallel.wrap: 'Layr' names no class .* Encoder, Layer, Linear.* 'Layer'"):
        find_units(Encoder(), ["Layr"])


def test_a_unit_that_shares_a_weight_with_the_rest_is_left_with_it() -> None:
    model = Encoder()
    model.encoder.layer[1].linear.weight = model.embeddings.weight  # type: ignore[union-attr, index]
    assert list(shardable_units(model, find_units(model))) == ["encoder.layer.0", "encoder.layer.2"]


def test_the_line_says_how_the_model_is_cut() -> None:
    model = Encoder()
    assert describe_units(model, find_units(model)) == "3 × Layer (encoder.layer.0 …) and the rest"
    assert "all of Linear" in describe_units(nn.Linear(4, 4), {})


def test_activation_checkpointing_recomputes_the_units_and_gives_the_same_gradients() -> None:
    calls = []
    plain, recomputed = Encoder(), Encoder()
    recomputed.load_state_dict(plain.state_dict())
    prepare_units(recomputed, ParallelConfig(checkpoint_blocks=1))
    for layer in recomputed.encoder.layer:  # type: ignore[union-attr]
        layer.linear.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, recomputed):
        model(torch.ones(2, 4)).sum().backward()
    assert len(calls) == 6
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_model_without_units_cannot_be_recomputed_by_them() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint_blocks=1: .* parallel.wrap=\[ClassName\]"):
        prepare_units(nn.Linear(4, 4), ParallelConfig(checkpoint_blocks=1))

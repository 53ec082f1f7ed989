"""State of models and optimizers is compared, copied and converted without loss, whatever lies behind it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp

from everstep.config import ParallelConfig, PrecisionConfig
from everstep.rank_env import RankInfo
from everstep.trainer.distributed.agreement import checksum
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.model_factory import second_copy, seeded_model
from everstep.trainer.distributed.sync_batchnorm import SyncBatchNorm, convert
from everstep.trainer.state.optimizer_state import OptimizerState

ALONE = Mesh(RankInfo(), torch.device("cpu"))


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_checksum_is_that_of_the_values_wherever_they_begin_in_memory(first: int, count: int) -> None:
    part = torch.arange(8, dtype=torch.float32)[first : first + count]
    assert checksum(part) == checksum(part.clone())


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("given", ["buffer", "weight", "module"])
def test_a_second_model_has_no_memory_in_common_with_the_first(looks: bool, given: str) -> None:
    codes, layer = torch.ones(3), nn.Linear(2, 2)

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), layer if given == "module" else nn.ReLU())
        if given == "buffer":
            model.register_buffer("codes", codes)
        if given == "weight":
            model[0].bias = nn.Parameter(codes[:2])
        if looks:
            assert float(model[0].weight.detach().abs().max()) < 1e6
        return model

    precision, parallel = PrecisionConfig(), ParallelConfig()
    live = seeded_model(build, 0, precision, parallel)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    second = second_copy(build, live, ALONE, parallel, precision, 0)
    with torch.no_grad():
        for tensor in (*second.parameters(), *second.buffers()):
            assert not tensor.is_meta
            tensor.fill_(7)
    for name, value in live.state_dict().items():
        assert torch.equal(value, before[name]), name


class Numbered(torch.optim.SGD):
    """Keeps its state under numbers."""

    def fill(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {0: torch.ones_like(parameter), (1, "x"): 2, "step": torch.tensor(3.0)}


def test_state_of_an_optimizer_under_keys_that_are_no_text_comes_back_with_them() -> None:
    def made() -> tuple[Numbered, OptimizerState]:
        model = nn.Linear(2, 1)
        optimizer = Numbered(model.parameters(), 0.1)
        return optimizer, OptimizerState(model, optimizer)

    (saved, state), (loaded, again) = made(), made()
    saved.fill()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = json.loads(json.dumps(state.pack(tensors)))
    entries = {n: dcp.TensorStorageMetadata(dcp.TensorProperties(t.dtype), t.shape, []) for n, t in tensors.items()}
    for name, target in again.allocate(dcp.Metadata(entries), values).items():
        target.copy_(tensors[name])
    again.load(values)
    for one, other in zip(saved.state.values(), loaded.state.values(), strict=True):
        assert list(map(repr, one.items())) == list(map(repr, other.items()))


def test_a_norm_that_is_used_twice_is_synchronised_in_both_places_and_keeps_its_hooks() -> None:
    norm, calls = nn.BatchNorm1d(3), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    expected = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model = convert(nn.Sequential(norm, norm))
    assert all(isinstance(layer, SyncBatchNorm) for layer in model)  # type: ignore[arg-type]
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x), expected(x))
    assert calls == [1, 1]

"""Models: x [n, 6] in, one number a sample out."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from everstep import Batch, Loss

WIDTH = 6


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


class Hidden(Plain):
    """Hidden layers, of which one is tall and none divides evenly among two processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 7), nn.GELU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 1))


class BatchNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 1))


class TorchsSyncBatchNorm(BatchNorm):
    """Layers that torch itself has for GPUs only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)


class Codebook(Plain):
    """Vector quantisation whose codes move by writes through `.data`, which torch's version counters do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach().double(), self.codes.double()).argmin(1)
        if self.training:
            for code in nearest.unique().tolist():
                self.codes.data[code].mul_(0.9).add_(x.detach()[nearest == code].mean(0), alpha=0.1)
        return super().forward(x + 0.1 * self.codes[nearest])


class Queue(Plain):
    """A queue of the last samples with a pointer, as contrastive learning has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(5, WIDTH))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) + (x @ self.queue.clone().T).mean(1)
        if self.training:
            places = (int(self.at) + torch.arange(len(x))) % len(self.queue)
            self.queue[places] = x.detach()
            self.at.fill_((int(self.at) + len(x)) % len(self.queue))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(x))).sum(1)


class TwoNames(nn.Module):
    """One parameter that is registered twice, before either module has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.first, self.second = weight, weight
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(x @ self.first) @ self.second)[:, 0]


class TiedAcrossBlocks(nn.Module):
    """Blocks of which two share a weight: FSDP cannot give it to either."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)
        )
        self.blocks[2][1].weight = self.blocks[0][1].weight
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)[:, 0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 3, 2))[0][:, -1])[:, 0]


class WeightNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, 8)), nn.GELU(), nn.Linear(8, 1))


class SpectralNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, 8)), nn.GELU(), nn.Linear(8, 1))


class ExtraTensor(Plain):
    """State that `get_extra_state` gives as a new tensor at each call, and that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.history = [1.0]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.history, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.history = state.tolist()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.history.append(self.history[-1] * 0.9)
        return super().forward(x) * self.history[-1]


class ExtraDict(ExtraTensor):
    """The same in a dict with a tensor, a number and a list in it."""

    def get_extra_state(self) -> dict:  # type: ignore[type-arg, override]
        return {"history": self.history, "n": len(self.history), "last": torch.tensor(self.history[-1]), "none": None}

    def set_extra_state(self, state: dict) -> None:  # type: ignore[type-arg, override]
        assert state["n"] == len(state["history"])
        self.history = list(state["history"])


class ExtraBytes(ExtraTensor):
    def get_extra_state(self) -> bytes:  # type: ignore[override]
        return ",".join(map(repr, self.history)).encode()

    def set_extra_state(self, state: bytes) -> None:  # type: ignore[override]
        self.history = [float(part) for part in state.decode().split(",")]


class Hooked(Plain):
    """A state dict that holds other names and half of the values; loading turns them back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.register_state_dict_post_hook(self._halve)
        self.register_load_state_dict_pre_hook(self._double)

    @staticmethod
    def _halve(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:  # type: ignore[type-arg]
        state[f"{prefix}half"] = state.pop(f"{prefix}scale") / 2

    @staticmethod
    def _double(module: nn.Module, state: dict, prefix: str, *rest: object) -> None:  # type: ignore[type-arg]
        if f"{prefix}half" in state:
            state[f"{prefix}scale"] = state.pop(f"{prefix}half") * 2

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.97)
        return super().forward(x) * self.scale


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum, self.head = nn.Parameter(torch.randn(4, dtype=torch.complex128)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Both parts of each product count: Adam would make a step of the rounding of a gradient that is zero.
        parts = torch.view_as_real(torch.fft.rfft(x) * self.spectrum).flatten(1)
        return self.head(parts.to(x.dtype))[:, 0]


class MixedTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8).to(torch.bfloat16)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 1).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x.to(torch.bfloat16)).float())
        return self.last(F.gelu(hidden).to(torch.bfloat16))[:, 0].float()


class FrozenBackbone(nn.Module):
    """The recipe of fine-tuning: no gradients and eval mode for a backbone with statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False)
        self.backbone.eval()
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert not any(module.training for module in self.backbone.modules())
        return self.head(self.backbone(x))[:, 0]


class Adapter(nn.Module):
    """A frozen layer with a low-rank addition, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + self.up(self.down(x))).sum(1)


class Conditional(Plain):
    """A branch that only some batches take."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.other(x)[:, 0] if float(x[0, 0]) > 0 else out


class Unused(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, 1)


class Expanded(Plain):
    """A buffer whose elements are one place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 0.5).expand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class ExpandedHooked(Expanded):
    """The same beside extra state, so that the model's own load_state_dict is called."""

    def get_extra_state(self) -> dict:  # type: ignore[type-arg]
        return {}

    def set_extra_state(self, state: dict) -> None:  # type: ignore[type-arg]
        pass


class Views(Plain):
    """Two buffers that are parts of one memory, of which one moves."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.ones(WIDTH)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[2:4])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.part.mul_(0.9)
        return super().forward(x * self.whole)


class Replaced(Plain):
    """A buffer that is assigned anew, longer each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = torch.cat([self.seen, self.seen[-1:] * 0.9])
            self.late = self.seen.mean()
        return super().forward(x) * (self.seen[-1] if self.late is None else self.late)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.view(-1, 2, 1, 3)).flatten(1))[:, 0]


class Scalar(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Counter(Plain):
    """State in plain attributes: a temperature, a flag, a tensor that is no buffer, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.started, self.running, self.last = 1.0, False, torch.zeros(WIDTH), [0.0]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.temperature *= 0.9
            self.running = 0.9 * self.running + 0.1
            self.last = [*self.last[-3:], self.temperature]
            if not self.started:
                self.started, self.bonus = True, 0.5
        return super().forward(x + self.running) * self.temperature + self.last[0] + getattr(self, "bonus", 0.0)


class NotPersistent(Plain):
    """A running value in a buffer that `state_dict()` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running.mul_(0.9).add_(0.1)
        return super().forward(x + self.running)


class Dropped(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 1))


class OwnGenerator(Plain):
    """Noise from a generator of its own, and from NumPy's and Python's global ones."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            x = x + 0.1 * noise + 0.1 * np.random.rand() + 0.1 * random.random()
        return super().forward(x)


class Switched(Plain):
    """Freezes its own norm after some steps, as fine-tuning does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == 3:
                self.norm.eval()
        return super().forward(self.norm(x))


class SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4, sparse=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x * 4).long() % 16).mean(1))[:, 0]


class Tagged(Plain):
    """Parameters with an attribute that the optimizer of zoo.optimizers.ByTag looks at."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.net[2].parameters():
            parameter.role = "head"  # type: ignore[attr-defined]


class Regression:
    """The task of all of them; `model` is the factory of one."""

    unit = "samples"

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        self.make = model

    def model(self) -> nn.Module:
        return self.make()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        error = model(batch["x"]) - batch["y"]
        return Loss(error.square().sum(), len(batch["y"]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        return self.loss(model, batch)


class AroundDdp(Regression):
    """Calls what lies inside of DDP, as code from a notebook does."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return super().loss(getattr(model, "module", model), batch)


class Remembering(Regression):
    """A task with state of its own."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.mean = torch.zeros(())

    def state_dict(self) -> dict:  # type: ignore[type-arg]
        return {"mean": self.mean, "history": [1, 2.5, "x"]}

    def load_state_dict(self, state: dict) -> None:  # type: ignore[type-arg]
        assert state["history"] == [1, 2.5, "x"]
        self.mean = state["mean"]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if model.training:
            self.mean = 0.9 * self.mean + 0.1
        loss = super().loss(model, batch)
        return Loss(loss.sum * (1 + self.mean), loss.count)


class Annealing(Regression):
    """A task with a number that it changes, and no state_dict()."""

    weight = 1.0

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.weight = 1.0

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if model.training:
            self.weight *= 0.9
        loss = super().loss(model, batch)
        return Loss(loss.sum * self.weight, loss.count)


class Halved(Regression):
    """A state dict that cannot be loaded again."""

    def state_dict(self) -> dict:  # type: ignore[type-arg]
        return {}


class Forgetful(Plain):
    """`load_state_dict` loses what `state_dict` gave."""

    def get_extra_state(self) -> dict:  # type: ignore[type-arg]
        return {"n": getattr(self, "n", 7)}

    def set_extra_state(self, state: dict) -> None:  # type: ignore[type-arg]
        self.n = 0


class Unsavable(Plain):
    def get_extra_state(self) -> dict:  # type: ignore[type-arg]
        return {"lock": object()}

    def set_extra_state(self, state: dict) -> None:  # type: ignore[type-arg]
        pass


class SparseOnly(nn.Module):
    """Nothing but a table with sparse gradients, as SparseAdam asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(16, 1, sparse=True, mode="mean")

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x * 4).long() % 16)[:, 0]


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x))).sum(1)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LazyLinear(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


class Mean(Regression):
    """Returns what a loss function of torch gives, as everybody does first."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:  # type: ignore[override]
        return F.mse_loss(model(batch["x"]), batch["y"])


class Measuring(Regression):
    """Metrics of the training loss; one that only some microbatches have."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        metrics = {"twice": 2 * loss.sum, "ones": torch.ones(()) * len(batch["x"])}
        return Loss(
            loss.sum, loss.count, metrics if batch["x"].sum() < 0 else metrics | {"above": loss.sum * 0 + loss.count}
        )


class Gathering(Regression):
    """A loss that compares each sample with those of all processes, as contrastive learning has it."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(batch["x"])
        others = [torch.empty_like(out) for _ in range(dist.get_world_size())] if dist.is_initialized() else [out]
        if dist.is_initialized():
            dist.all_gather(others, out.detach())
        mean = torch.cat(others).detach().mean()
        return Loss((out - batch["y"] - 0.1 * mean).square().sum(), len(batch["y"]))


class TakenName(Regression):
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        return Loss(loss.sum, loss.count, {"lr": loss.sum})


class PerSample(Regression):
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss((model(batch["x"]) - batch["y"]).square(), len(batch["y"]))


class Matrix(Regression):
    """A confusion matrix for a metric."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        loss = self.loss(model, batch)
        return Loss(loss.sum, loss.count, {"matrix": torch.zeros(2, 2)})


class Broken(Regression):
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(batch["x"]).sum(), 1 // 0)


class MadeBefore(Regression):
    """Makes its model in the constructor, and gives the same one at each call."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.net = Plain()

    def model(self) -> nn.Module:
        return self.net


class LooksAtWeights(Regression):
    """A factory that reads values of its weights."""

    def model(self) -> nn.Module:
        model = Plain()
        assert float(model.net[0].weight.abs().max()) < 1e6  # type: ignore[union-attr]
        return model


class Running(Plain):
    """State in attributes that NumPy made, in a set, in nested containers, and in a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.array, self.number, self.complex = np.zeros(WIDTH, np.float32), np.float64(1.0), 1j
        self.seen: set[int] = set()
        self.history: list[float] = []
        self.nested = {"tensor": torch.zeros(WIDTH), "list": [0.0]}

    def forward(self, x: Tensor) -> Tensor:
        # In place, in evaluations too: those are to leave nothing behind.
        self.array += 0.1
        self.number *= 0.9
        self.complex *= 1j
        self.seen.add(len(self.history) % 7)
        self.history += [float(self.number)] * 20
        self.nested["tensor"].add_(0.1)  # type: ignore[attr-defined]
        self.nested["list"][0] += 0.1  # type: ignore[index]
        bias = sum(self.history) + self.complex.real + len(self.seen) + self.nested["list"][0]  # type: ignore[index]
        return super().forward(x + torch.from_numpy(self.array.copy()) + self.nested["tensor"]) + 0.01 * bias


class Growing(Plain):
    """A buffer whose size follows from the samples that a process has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.largest = torch.cat([self.largest, x[:, 0][x[:, 0] > 0].detach()])
        return super().forward(x)


class Activated(nn.BatchNorm1d):
    """A BatchNorm with an activation, as libraries of vision models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class ActivatedNorm(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), Activated(8), nn.Linear(8, 1))


class HandsOut(Regression):
    """Hands the same tensor to each model that it makes, and looks at the weights of each."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.codes = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)

    def model(self) -> nn.Module:
        model = Codebook()
        model.codes = self.codes
        assert float(model.net[0].weight.abs().max()) < 1e6  # type: ignore[union-attr]
        return model


class Counts:
    """A hook that counts steps in an attribute."""

    def __init__(self, by: int = 1) -> None:
        self.by, self.count = by, 0

    def __call__(self, info: object) -> None:
        self.count += self.by


class CountsTwice(Counts):
    def __call__(self, info: object) -> None:
        self.count += 2 * self.by

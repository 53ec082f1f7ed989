"""Models, tasks and optimizers with state that no checkpoint holds."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn

from everstep import Batch, Loss
from zoo.models import Plain, Regression

PASSES = [0]


class Meter:
    """A running value in an object of a class."""

    def __init__(self) -> None:
        self.value = 1.0

    def step(self) -> float:
        self.value *= 0.9
        return self.value


class InAnObject(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.meter.step()


class InADictOfObjects(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.meters = {"scale": Meter()}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.meters["scale"].step()


class InAClosure(Plain):
    def __init__(self) -> None:
        super().__init__()
        value = 1.0

        def step() -> float:
            nonlocal value
            value *= 0.9
            return value

        self.scale = step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale()


class LastOutput(Plain):
    """Output of a pass in an attribute, which the next pass takes."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.last is not None:
            out = out + self.last.mean()
        self.last = out.detach()
        return out


class MadeByTheFirstPass(Plain):
    """A flag that is saved, beside a module that is not there in a new model."""

    def __init__(self) -> None:
        super().__init__()
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:
            self.started, self.meter = True, Meter()
        return super().forward(x) * self.meter.step()


class FromAGlobal(Plain):
    def forward(self, x: Tensor) -> Tensor:
        PASSES[0] += 1
        return super().forward(x) * 0.9 ** PASSES[0]


class FromTheClock(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (time.monotonic_ns() % 1009)


class FromAnUnseededGenerator(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + float(np.random.default_rng().normal())


class LateBuffer(Plain):
    """A buffer that the first pass adds, which no new model has."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.detach().mean(0))
        return super().forward(x)


class Activations(Plain):
    """Activations in attributes, to be looked at; no other pass takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None
        self.count = Meter()

    def forward(self, x: Tensor) -> Tensor:
        self.count.step()
        self.seen = super().forward(x)
        return self.seen


class Weighted(Regression):
    """A task that weighs the loss by a running value in an object."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.meter = Meter()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        return Loss(loss.sum * self.meter.step(), loss.count)


class Decaying(torch.optim.SGD):
    """An optimizer with a factor in an object of a class."""

    def __init__(self, params, lr: float = 0.05) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, lr=lr)
        self.meter = Meter()

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        factor = self.meter.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return super().step(closure)


class Timed(Regression):
    """A task that measures its own time, which changes nothing that is trained."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.seconds = 0.0

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        began = time.monotonic()
        loss = super().loss(model, batch)
        self.seconds += time.monotonic() - began
        return loss


class Teacher(Regression):
    """A moving average of the model that the task makes at its first step."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.teacher: nn.Module | None = None

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        inner = getattr(model, "module", model)
        if self.teacher is None:
            self.teacher = self.model()
        with torch.no_grad():
            for mean, now in zip(self.teacher.parameters(), inner.parameters(), strict=True):
                mean.lerp_(now.detach(), 0.5)
            target = self.teacher(batch["x"])
        return Loss((model(batch["x"]) - batch["y"] - 0.1 * target).square().sum(), len(batch["y"]))


class TimedAndWeighted(Timed):
    """A task with a timer beside a running value in an object, on which the loss depends."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.meter = Meter()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        return Loss(loss.sum * self.meter.step(), loss.count)


class LearntWeight(Regression):
    """A task with a parameter of its own, which no optimizer has."""

    def __init__(self, model) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        return Loss(loss.sum * self.scale, loss.count)


class MeanInAnObject(Plain):
    """A running mean, which stays what it is if the same batch is passed again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.meter, self.count = Meter(), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.meter.value += (float(x.sum()) - self.meter.value) / self.count
        return super().forward(x) * (1 + self.meter.value / 10)


class NotANumber(Plain):
    """A best value that is NaN until there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.best = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.best = float("nan")
        return super().forward(x)


class Freezing(Plain):
    """Freezes its first layer after some passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            if self.passes == 6:
                self.net[0].requires_grad_(False)
        return super().forward(x)


class Unfreezing(Plain):
    """Unfreezes a layer that was frozen when the optimizer was made."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.net[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            if self.passes == 2:
                self.net[0].requires_grad_(True)
        return super().forward(x)

"""A small adversarial task: a critic and a generator in one model, trained by turns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep import Batch, Loss
from everstep.optimizers import Alternating
from support.toy import WIDTH, Block


class Adversaries(nn.Module):
    """Two networks."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(dropout), nn.Linear(WIDTH, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(dropout), nn.Linear(WIDTH, 1))

    def forward(self, real: Tensor, noise: Tensor, turn: str) -> tuple[Tensor, Tensor]:
        """Return the critic's scores of real and of generated samples."""
        fake = self.generator(noise)
        if turn == "critic":
            fake = fake.detach()
        return self.critic(real)[:, 0], self.critic(fake)[:, 0]


class AdversarialTask:
    unit = "samples"

    def __init__(self, dropout: float = 0.3) -> None:
        self.dropout = dropout

    def model(self) -> nn.Module:
        return Adversaries(self.dropout)

    def loss(self, model: nn.Module, batch: Batch, turn: str) -> Loss:
        noise = torch.randn_like(batch["x"])
        real, fake = model(batch["x"], noise, turn)
        loss = (F.softplus(-fake) if turn == "generator" else F.softplus(-real) + F.softplus(fake)).sum()
        return Loss(loss, len(real), {f"{turn}_loss": loss.detach()})

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        real, fake = model(batch["x"], batch["x"].flip(1), "critic")
        return Loss((real - fake).sum(), len(real), {"mae": (real - fake).abs().sum()})


class ForgetfulTask(AdversarialTask):
    """Its generator gets no gradient in its turn."""

    def loss(self, model: nn.Module, batch: Batch, turn: str) -> Loss:
        return super().loss(model, batch, "critic")


class StillTask(AdversarialTask):
    """Its noise is a function of the sample, and there is no dropout."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def loss(self, model: nn.Module, batch: Batch, turn: str) -> Loss:
        real, fake = model(batch["x"], batch["x"].flip(1), turn)
        loss = F.softplus(-fake) if turn == "generator" else F.softplus(-real) + F.softplus(fake)
        return Loss(loss.sum(), len(real))


class TurnlessTask(AdversarialTask):
    def loss(self, model: nn.Module, batch: Batch) -> Loss:  # type: ignore[override]
        return super().loss(model, batch, "critic")


class BiasedTask(AdversarialTask):
    """It has a parameter that belongs to neither network."""

    def model(self) -> nn.Module:
        model = super().model()
        model.bias = nn.Parameter(torch.zeros(1))
        return model


def pair(model: nn.Module) -> Alternating:
    """Optimizers that a project makes itself."""
    critic = torch.optim.AdamW(model.critic.parameters(), lr=0.01)
    return Alternating({"critic": critic, "generator": torch.optim.SGD(model.generator.parameters(), lr=0.1)},
                       ["generator", "critic"])  # fmt: skip

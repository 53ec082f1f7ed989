"""Optimizers that keep their state where they like."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

Params = list


class Own(torch.optim.Optimizer):
    """Gradient descent whose factor `factor(group)` a subclass has state for."""

    defaults_of_kind: ClassVar[dict] = {}  # type: ignore[type-arg]

    def __init__(self, params: Params, lr: float = 0.05, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **self.defaults_of_kind})

    def factor(self, group: dict) -> float:  # type: ignore[type-arg]
        return 1.0

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[no-untyped-def, override]
        for group in self.param_groups:
            factor = self.factor(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group["lr"] * factor)

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        p.sub_(gradient, alpha=lr)


class Prodigy(Own):
    """Counters and distances in the groups: numbers, a list, a tensor, a tuple."""

    defaults_of_kind: ClassVar[dict] = {"k": 0, "d": 1.0, "history": [], "total": None, "betas": (0.9, 0.99)}

    def factor(self, group: dict) -> float:  # type: ignore[type-arg]
        group["k"] += 1
        group["d"] *= 0.9
        group["history"] = [*group["history"], group["d"]]
        group["total"] = torch.zeros(2) + group["k"] if group["total"] is None else group["total"] + 1
        return group["d"] / (1 + group["total"][0].item() * 0.01) + group["history"][0] * 0.01


class ScheduleFree(Own):
    """Averages its own iterates; has to be told when the model is evaluated, and refuses to step otherwise."""

    defaults_of_kind: ClassVar[dict] = {"k": 0, "train_mode": False}

    @torch.no_grad()
    def train(self) -> None:
        self._switch(True, 1 - 1 / 0.9)

    @torch.no_grad()
    def eval(self) -> None:
        self._switch(False, 0.1)

    def _switch(self, mode: bool, share: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], share)
                group["train_mode"] = mode

    def factor(self, group: dict) -> float:  # type: ignore[type-arg]
        if not group["train_mode"]:
            raise RuntimeError("the optimizer is not in train mode")
        group["k"] += 1
        return 1.0 / group["k"]

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        z = self.state[p].setdefault("z", p.detach().clone())
        z.sub_(gradient, alpha=lr)
        p.lerp_(z, 0.3)


class Shampoo(Own):
    """Lists and dicts of tensors for a parameter, of shapes of their own; a deque of numbers."""

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["preconditioners"] = [torch.ones(n) for n in p.shape]
            state["nested"] = {"momentum": [torch.zeros(p.numel())], "names": ("a", 1), "empty": []}
        state["step"] += 1
        state["nested"]["momentum"][0].mul_(0.9).add_(gradient.reshape(-1))
        scale = gradient
        for dim, weights in enumerate(state["preconditioners"]):
            others = [d for d in range(gradient.dim()) if d != dim]
            weights.add_(gradient.square().sum(others) if others else gradient.square())
            scale = scale / weights.sqrt().view([-1 if d == dim else 1 for d in range(gradient.dim())])
        p.sub_(scale + 0.1 * state["nested"]["momentum"][0].view(p.shape), alpha=lr / state["step"])


class Attribute(Own):
    """A counter on the optimizer itself."""

    def __init__(self, params: Params, lr: float = 0.05, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.steps_done = 0

    def factor(self, group: dict) -> float:  # type: ignore[type-arg]
        self.steps_done += 1
        return 1.0 / self.steps_done


class SharedState(Own):
    """State under a name and not under a parameter."""

    def factor(self, group: dict) -> float:  # type: ignore[type-arg]
        self.state["global"] = {"n": self.state.get("global", {"n": 0})["n"] + 1}
        return 1.0 / self.state["global"]["n"]


class OwnStateDict(Own):
    """An entry of its own in `state_dict()`."""

    def __init__(self, params: Params, lr: float = 0.05, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.scaler = [torch.ones(3)]

    def factor(self, group: dict) -> float:  # type: ignore[type-arg]
        self.scaler[0] *= 0.9
        return float(self.scaler[0][0])

    def state_dict(self) -> dict:  # type: ignore[type-arg, override]
        return {**super().state_dict(), "scaler": self.scaler[0].clone()}

    def load_state_dict(self, state_dict: dict) -> None:  # type: ignore[type-arg]
        state = dict(state_dict)
        self.scaler = [state.pop("scaler")]
        super().load_state_dict(state)


class MuonWithAdamW(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for the rest, in one optimizer."""

    def __init__(self, params: Params, lr: float = 0.02, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[no-untyped-def, override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                if p.dim() == 2:
                    p.sub_(momentum / (momentum.norm() + 1e-6), alpha=group["lr"])
                    continue
                square = self.state[p].setdefault("square", torch.zeros_like(p)).mul_(0.99).addcmul_(p.grad, p.grad)
                p.sub_(momentum / (square.sqrt() + 1e-6), alpha=0.1 * group["lr"])


class ByTag(Own):
    """Other rates for tagged parameters."""

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        p.sub_(gradient, alpha=lr * (10 if getattr(p, "role", "") == "head" else 1))


class Unsavable(Own):
    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        self.state[p]["lock"] = object()
        super().update(p, gradient, lr)


class PerRank(Own):
    """State that is another on each process."""

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        import os

        self.state[p]["rank"] = torch.full((2,), float(os.environ.get("RANK", "0")))
        super().update(p, gradient, lr)


class AddsAGroup(torch.optim.SGD):
    """Makes a new group of its last parameter at its second step, as code that unfreezes layers does."""

    def __init__(self, params, lr: float = 0.05) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        self.steps += 1
        if self.steps == 2:
            moved = self.param_groups[-1]["params"].pop()
            self.add_param_group({"params": [moved], "lr": 0.1 * self.defaults["lr"]})
        return super().step(closure)

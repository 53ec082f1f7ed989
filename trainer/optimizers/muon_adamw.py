"""Muon for the matrices of hidden layers, AdamW for embeddings, head and vectors, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from everstep.errors import ConfigError, nearest

MUON = "muon"
"""Entry of a group: True for matrices that Muon trains."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


class MuonAdamW(torch.optim.Optimizer):
    """Splits each group of parameters; both halves keep their state under their parameters.

    Muon's step is that of `torch.optim.Muon` with `match_rms_adamw`, so that both halves can share a learning rate and
    a decay. A matrix that is sharded is gathered for its orthogonalization, which is one of the whole matrix.

    Args:
        model: the model, whose modules say which matrices are embeddings.
        adamw: patterns of further matrices that AdamW trains; None takes the head, which is the last linear layer.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        muon_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        adamw: Sequence[str] | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"optimizer.momentum={momentum}: must be in [0, 1)")
        if not 1 <= ns_steps < 100:
            raise ConfigError(f"optimizer.ns_steps={ns_steps}: must be in 1 to 99")
        hidden = {id(p) for p in _hidden(model, adamw)}
        own = {
            "lr": lr if muon_lr is None else muon_lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
        }
        matrices, others = [], []
        for group in params:
            chosen: list[list[Tensor]] = [[], []]
            for parameter in group["params"]:
                chosen[id(parameter) in hidden].append(parameter)
            others += [{**group, MUON: False, "params": chosen[0]}] if chosen[0] else []
            matrices += [{**group, **own, MUON: True, "params": chosen[1]}] if chosen[1] else []
        if not matrices:
            raise ConfigError("the model has no matrices of hidden layers for Muon; choose optimizer=adamw")
        for group in matrices:
            group.setdefault("weight_decay", weight_decay)
        self._adamw = _adamw(others, lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), eps=eps)
        super().__init__([*matrices, *others], {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise TypeError("MuonAdamW takes no closure")
        for group in self.param_groups:
            if group[MUON]:
                self._orthogonal_step(group)
        if self._adamw is not None:
            # Both are the same objects, until a state is loaded.
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if not group[MUON]]
            self._adamw.step()

    @torch.no_grad()
    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            update = gradient.lerp(average, momentum) if group["nesterov"] else average
            update = _of_whole(update, group["ns_steps"])
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """Return the nearest orthogonal matrix, roughly, by Newton–Schulz steps.

    They are computed in bfloat16 like torch's; a run in float64 computes in float64.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.dtype is torch.float64 else matrix.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _of_whole(update: Tensor, steps: int) -> Tensor:
    """Orthogonalize a matrix, which is gathered if it is sharded; return it sharded as before."""
    if not isinstance(update, DTensor):
        return orthogonalized(update, steps)
    whole = orthogonalized(update.full_tensor(), steps)
    mesh = update.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, update.placements)


def _adamw(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.AdamW | None:
    """Return the optimizer of the other parameters; it adds its defaults to the groups."""
    return torch.optim.AdamW(groups, **arguments) if groups else None


def _hidden(model: nn.Module, patterns: Sequence[str] | None) -> list[nn.Parameter]:
    """Return the matrices of hidden layers: all but embeddings, and the head or what the patterns name."""
    names = dict(model.named_parameters(remove_duplicate=False))
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    others = {id(weight) for weight in embeddings}
    if patterns is None:
        linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        others |= {id(linear[-1])} if linear else set()
    for pattern in patterns or ():
        found = [id(p) for name, p in names.items() if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(f"optimizer.adamw: {pattern!r} matches no parameter{nearest(pattern, names)}")
        others.update(found)
    return [p for p in model.parameters() if p.dim() == 2 and not p.is_complex() and id(p) not in others]


def muon_fact(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, str]:
    """Return which matrices AdamW trains beside Muon's, for the run's first lines."""
    if not isinstance(optimizer, MuonAdamW):
        return {}
    muon = {id(p) for group in optimizer.param_groups if group[MUON] for p in group["params"]}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rest = [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) in trained - muon]
    more = f" and {len(rest) - 6} more" if len(rest) > 6 else ""
    return {"muon": f"{len(muon)} matrices; adamw: {', '.join([*rest[:6], 'vectors'])}{more}"}

"""Optimization: parameter groups, the learning rate as a function of the step, the moving average."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everstep.config import Node, ScheduleConfig, Shape
from everstep.errors import ConfigError
from everstep.trainer.plugins import TARGET, instantiate

SHOWN = 6
"""Kinds of parameters that are listed by name."""
FUSED = ("torch.optim.AdamW", "torch.optim.Adam")
FUSED_WHOLE = ("torch.optim.SGD",)
"""Optimizers whose fused kernel works on whole tensors only, not on shards."""


def lr_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Return the learning rate of update `step` (1 is the first) as a fraction of the highest."""
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    span = max(1, steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / span)
    low = schedule.final_fraction
    if schedule.shape is Shape.cosine:
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.shape is Shape.linear:
        return 1 - (1 - low) * done
    if schedule.shape is Shape.wsd:
        return 1 - (1 - low) * max(0.0, done - (1 - schedule.decay_fraction)) / schedule.decay_fraction
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        # A group that was added on the way has no peak yet; the next save refuses it.
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor


def build_optimizer(node: Node, model: nn.Module, plugins: Iterable[str]) -> torch.optim.Optimizer:
    """Return the optimizer of a node, fused if possible; norms and biases do not decay.

    Norms and biases are the parameters of one dimension or none. An optimizer that makes groups of its own sets their
    decay itself.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("the model has no parameters to train; change model or task")
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    sharded = any(isinstance(p, DTensor) for p in trained)
    fusable = node[TARGET] in (FUSED if sharded else (*FUSED, *FUSED_WHOLE)) and _fits_fused(model, trained)
    optimizer = instantiate({**({"fused": True} if fusable else {}), **node}, "optimizer", plugins, params=groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer._target_={node[TARGET]!r} is not an optimizer")
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def _fits_fused(model: nn.Module, trained: Sequence[nn.Parameter]) -> bool:
    """True if the fused kernels take all parameters: no complex ones and none with sparse gradients."""
    sparse = any(getattr(module, "sparse", False) is True for module in model.modules())
    return not sparse and all(p.is_floating_point() for p in trained)


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """True for optimizers that must be switched when the model is evaluated (schedule-free)."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def group_facts(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, str]:
    """Return facts about parameter groups for the run's first lines: learning rates and weight decay."""
    facts = {}
    rates = sorted({group["peak_lr"] for group in optimizer.param_groups})
    if len(rates) > 1:
        facts["lr"] = f"{rates[0]:.3g} to {rates[-1]:.3g}, by group; that of the first is logged"
    decays = {id(p): group.get("weight_decay", 0.0) for group in optimizer.param_groups for p in group["params"]}
    values = sorted({value for value in decays.values() if value})
    if values:
        names = {name: decays[id(p)] for name, p in model.named_parameters() if id(p) in decays}
        kinds = _kinds([name for name in names if not names[name]], [name for name in names if names[name]])
        more = f" and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else ""
        none = f"; none for {', '.join(kinds[:SHOWN])}{more}" if kinds else ""
        facts["weight decay"] = " and ".join(f"{value:.3g}" for value in values[:3]) + none
    return facts


def _kinds(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the shortest patterns, of few, that the names match and the others do not."""
    kinds = []
    for name in names:
        words = name.split(".")
        ends = [".".join(["*", *words[-1:]])] if words[-1] == "bias" else []
        ends += [".".join(["*", *words[-2:]])] if len(words) > 2 else []
        free = (end for end in ends if not any(f".{other}".endswith(end[1:]) for other in others))
        kinds.append(next(free, re.sub(r"\b\d+\b", "*", name)))
    return list(dict.fromkeys(kinds))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the tensors as one list for each type, in their order."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


class WeightEma:
    """An exponential moving average of the weights, sharded over the ranks as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._pairs = [
            (local(self.shadow[name]), local(p.detach())) for name, p in model.named_parameters() if p.requires_grad
        ]

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Move towards the weights; `skipped` is 1.0, on the device, for a step that changed nothing."""
        averages, weights = (list(side) for side in zip(*self._pairs, strict=True))
        if skipped is None:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
            return
        share = (1 - self.decay) * (1 - skipped)
        for average, weight in self._pairs:
            average.lerp_(weight, share.to(average.dtype))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights; a second call restores them."""
        for average, weight in self._pairs:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

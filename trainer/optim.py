"""Optimization: the optimizer and its groups, the learning rate of a step, the moving average."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everstep.config import Node
from everstep.errors import ConfigError
from everstep.trainer.optimizers.alternating import Alternating, check_all_matched, check_turns
from everstep.trainer.optimizers.matched import ALTERNATING, matched_parameters
from everstep.trainer.param_groups import GROUPS, NamedGroups
from everstep.trainer.plugins import TARGET, instantiate

SHOWN = 6
"""Kinds of parameters that are listed by name."""
FUSED = ("torch.optim.AdamW", "torch.optim.Adam")
FUSED_WHOLE = ("torch.optim.SGD",)
"""Optimizers whose fused kernel works on whole tensors only, not on shards."""


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
        raise ConfigError("the model has no parameters to train; change model, task or optimizer.groups")
    named = NamedGroups.of_node(node, model)
    own = {key: value for key, value in node.items() if key != GROUPS}
    optimizer: torch.optim.Optimizer
    if node[TARGET] == ALTERNATING:
        optimizer = _alternating(own, model, named, plugins)
    else:
        optimizer = _made(own, "optimizer", model, trained, named, plugins)
    if isinstance(optimizer, Alternating):
        check_all_matched(optimizer, model)
    named.scale(optimizer)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def _made(
    node: Node, key: str, model: nn.Module, trained: Sequence[nn.Parameter], named: NamedGroups, plugins: Iterable[str]
) -> torch.optim.Optimizer:
    """Return the optimizer that a node describes, of some parameters."""
    if TARGET not in node:
        raise ConfigError(f"{key} has no {TARGET}: it must name an optimizer, such as torch.optim.Adam")
    sharded = any(isinstance(p, DTensor) for p in trained)
    fusable = node[TARGET] in (FUSED if sharded else (*FUSED, *FUSED_WHOLE)) and _fits_fused(model, trained)
    own = {**({"fused": True} if fusable else {}), **node}
    optimizer = instantiate(own, key, plugins, params=named.param_groups(trained), model=model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{key}._target_={node[TARGET]!r} is not an optimizer")
    return optimizer


def _alternating(node: Node, model: nn.Module, named: NamedGroups, plugins: Iterable[str]) -> Alternating:
    """Return the named optimizers of a node as one."""
    found = matched_parameters(node, model)
    check_turns(node.get("turns"), found)
    made = {
        name: _made(arguments, f"optimizer.optimizers.{name}", model, members, named, plugins)
        for name, (arguments, members) in found.items()
    }
    return Alternating(made, node["turns"])


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

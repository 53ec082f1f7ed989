"""Several optimizers that take turns, one of them at each step, as adversarial training needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError, nearest


class Alternating(torch.optim.Optimizer):
    """Named optimizers as one, of which each step uses the one whose turn it is.

    The turn follows from the number of the step alone. A step drops the gradients of all other parameters before it
    clips and updates, so their weights and their optimizer's state stay as they are, to the last bit.

    Args:
        optimizers: optimizers by name; no parameter is in two of them.
        turns: name of the optimizer of each step; after the last the first follows again.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], turns: Sequence[str]) -> None:
        check_turns(turns, optimizers)
        self.turns = tuple(turns)
        self._members: dict[str, tuple[torch.optim.Optimizer, slice]] = {}
        groups: list[dict[str, Any]] = []
        for name, member in optimizers.items():
            _check_member(name, member)
            self._members[name] = member, slice(len(groups), len(groups) + len(member.param_groups))
            groups += member.param_groups
        decays = all("weight_decay" in member.defaults for member in optimizers.values())
        super().__init__(groups, {"weight_decay": 0.0} if decays else {})

    def turn(self, step: int) -> str:
        """Return the name of the optimizer that a step uses; 1 is the first step."""
        return self.turns[(step - 1) % len(self.turns)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the optimizers that have turns, in the order of their first ones."""
        return tuple(dict.fromkeys(self.turns))

    @property
    def first_steps(self) -> dict[int, int]:
        """Number of turns by the step of the first of them, of each optimizer."""
        return {self.turns.index(name) + 1: self.turns.count(name) for name in self.names}

    def parameters(self, turn: str) -> list[Tensor]:
        """Return the parameters that the steps of a turn train."""
        return [p for group in self.param_groups[self._members[turn][1]] for p in group["params"]]

    def check_gradients(self, step: int) -> None:
        """Raise ConfigError if no parameter of a step's turn got a gradient."""
        turn = self.turn(step)
        if all(p.grad is None for p in self.parameters(turn)):
            raise ConfigError(
                f"optimizer.turns={list(self.turns)}: step {step} is the turn of {turn!r}, and none of its parameters "
                f"got a gradient; let task.loss return a loss of them for turn={turn!r}"
            )

    def keep(self, step: int) -> None:
        """Drop all gradients but those of a step's turn."""
        turn = self.turn(step)
        for name in self._members:
            if name != turn:
                for parameter in self.parameters(name):
                    parameter.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters of each optimizer of which one has a gradient."""
        if closure is not None:
            raise TypeError("Alternating takes no closure")
        skipped: Tensor | None = getattr(self, "found_inf", None)
        for name, (member, part) in self._members.items():
            if all(p.grad is None for p in self.parameters(name)):
                continue
            # Both are the same objects, until a state is loaded.
            member.state, member.param_groups = self.state, self.param_groups[part]
            if skipped is not None:
                if not all(group.get("fused") for group in member.param_groups):
                    if skipped.item():
                        continue
                else:
                    member.found_inf = skipped  # type: ignore[attr-defined]
            member.step()
            self._check_state(name, member)

    def _check_state(self, name: str, member: torch.optim.Optimizer) -> None:
        if not all(isinstance(key, Tensor) for key in self.state):
            raise ConfigError(
                f"optimizer.optimizers.{name}: {type(member).__name__} keeps state that belongs to no parameter, which "
                "the others would change; choose another optimizer"
            )


def turns_of(optimizer: torch.optim.Optimizer) -> Alternating | None:
    """Return the optimizer if it alternates, else None."""
    return optimizer if isinstance(optimizer, Alternating) else None


def check_turns(turns: object, names: Mapping[str, object]) -> None:
    """Raise ConfigError unless `turns` is a list of names in which each name has a turn."""
    listed = ", ".join(names)
    if not names:
        raise ConfigError("optimizer.optimizers={}: must name at least one optimizer; write {critic: {match: …}}")
    if isinstance(turns, str) or not isinstance(turns, Sequence) or not turns:
        raise ConfigError(f"optimizer.turns={turns!r}: must be a list of names; write turns: [{listed}]")
    for turn in turns:
        if turn not in names:
            raise ConfigError(
                f"optimizer.turns={list(turns)}: there is no optimizer {turn!r}{nearest(str(turn), names)}; "
                f"there are {listed}"
            )
    for name in names:
        if name not in turns:
            raise ConfigError(
                f"optimizer.turns={list(turns)}: {name!r} has no turn; add it, or freeze its parameters with "
                "optimizer.groups and leave it out"
            )


def check_all_matched(optimizer: Alternating, model: nn.Module) -> None:
    """Raise ConfigError for a parameter that no optimizer trains, though it is not frozen."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ConfigError(
            f"optimizer.optimizers: none trains {left[0]}{more}; match it in one of {', '.join(optimizer.names)}, or "
            f"freeze it with optimizer.groups=[{{match: {left[0]!r}, frozen: true}}]"
        )


def turns_fact(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return the turns and what each trains, for the run's first lines."""
    if (turns := turns_of(optimizer)) is None:
        return {}
    runs = [(name, len(list(again))) for name, again in groupby(turns.turns)]
    order = ", ".join(f"{count} × {name}" if count > 1 else name for name, count in runs[:8])
    sizes = ", ".join(f"{name} trains {len(turns.parameters(name))} tensors" for name in turns.names[:8])
    return {"turns": f"{order}{', …' if len(runs) > 8 else ''}; {sizes}"}


def _check_member(name: str, member: torch.optim.Optimizer) -> None:
    key = f"optimizer.optimizers.{name}"
    if isinstance(member, Alternating):
        raise ConfigError(f"{key}: an optimizer with turns of its own; list its optimizers beside the others")
    if all(callable(getattr(member, mode, None)) for mode in ("train", "eval")):
        raise ConfigError(f"{key}: {type(member).__name__} switches weights for evaluation; choose another optimizer")

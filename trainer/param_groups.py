"""Parameter groups by name, `optimizer.groups`: a rate, a decay or a freeze for what matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from everstep.config import Node
from everstep.errors import ConfigError, nearest

GROUPS = "groups"
"""Key of the optimizer's node that its constructor does not get."""
KEYS = ("match", "lr_scale", "weight_decay", "frozen")
SHOWN = 4
"""Names that a message lists; the others are counted."""
Kind = tuple[float, float | None]
"""Factor of the learning rate, and the weight decay or None for the optimizer's."""


@dataclass(frozen=True)
class NamedGroup:
    """One entry of `optimizer.groups`."""

    match: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    """None leaves it as usual: the optimizer's for matrices, none for norms and biases."""
    frozen: bool = False


@dataclass(frozen=True)
class NamedGroups:
    """The entries of `optimizer.groups`, each with the parameters of a model that it names."""

    found: Mapping[int, NamedGroup] = field(default_factory=dict)
    """By the identity of the parameter."""

    @classmethod
    def of_node(cls, node: Node, model: nn.Module) -> NamedGroups:
        """Match the entries with the model's parameters.

        Raises:
            ConfigError: an entry is wrong or names no parameter, or two name the same one.
        """
        groups = _parse(node.get(GROUPS))
        names = dict(model.named_parameters(remove_duplicate=False))
        found: dict[int, NamedGroup] = {}
        for group in groups:
            matched = [name for name in names if fnmatchcase(name, group.match)]
            if not matched:
                raise ConfigError(f"optimizer.groups: {group.match!r} matches no parameter{near(group.match, names)}")
            for name in matched:
                other = found.setdefault(id(names[name]), group)
                if other is not group:
                    raise ConfigError(
                        f"optimizer.groups: {name} is matched by {other.match!r} and by {group.match!r}; "
                        "let one of the patterns leave it out"
                    )
        return cls(found)

    def param_groups(self, trained: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """Return groups for a constructor: matrices, vectors without decay, then each other kind."""
        kinds: dict[Kind, list[nn.Parameter]] = {(1.0, None): [], (1.0, 0.0): []}
        for parameter in trained:
            kinds.setdefault(self._kind(parameter), []).append(parameter)
        return [
            {"params": members} if decay is None else {"params": members, "weight_decay": decay}
            for (_, decay), members in kinds.items()
            if members
        ]

    def scale(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the learning rates of the optimizer's groups; ConfigError if it did not keep the groups apart."""
        if not self.found:
            return
        if "weight_decay" not in optimizer.defaults and any(g.weight_decay is not None for g in self.found.values()):
            raise ConfigError(
                f"optimizer.groups: {type(optimizer).__name__} has no weight_decay; leave it out of the groups"
            )
        for group in optimizer.param_groups:
            kinds = {self._kind(parameter) for parameter in group["params"]}
            if len({scale for scale, _ in kinds}) > 1 or not self._decays_as_said(group):
                raise ConfigError(
                    f"optimizer.groups: {type(optimizer).__name__} makes groups of its own, which mix those of the "
                    "config; leave optimizer.groups out, and give the rates to its constructor"
                )
            group["lr"] = group["lr"] * next(iter(kinds), (1.0, None))[0]

    def _kind(self, parameter: Tensor) -> Kind:
        usual = None if parameter.dim() >= 2 else 0.0
        group = self.found.get(id(parameter))
        if group is None:
            return 1.0, usual
        return group.lr_scale, usual if group.weight_decay is None else group.weight_decay

    def _decays_as_said(self, group: Mapping[str, Any]) -> bool:
        wanted = (self.found.get(id(parameter)) for parameter in group["params"])
        return all(
            each is None or each.weight_decay is None or each.weight_decay == group.get("weight_decay")
            for each in wanted
        )


def frozen_model(build: Callable[[], nn.Module], node: Node) -> nn.Module:
    """Build the model, and freeze what `optimizer.groups` freezes, before it is laid out over processes."""
    model = build()
    if node.get(GROUPS):
        groups = NamedGroups.of_node(node, model)
        for parameter in model.parameters():
            group = groups.found.get(id(parameter))
            if group is not None and group.frozen:
                parameter.requires_grad_(False)
    return model


def _parse(entries: object) -> list[NamedGroup]:
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError("optimizer.groups must be a list of groups; write '[{match: \"head.*\", lr_scale: 10}]'")
    return [_entry(number, entry) for number, entry in enumerate(entries)]


def _entry(number: int, entry: Mapping[str, Any]) -> NamedGroup:
    place = f"optimizer.groups[{number}]"
    for key in entry:
        if key not in KEYS:
            raise ConfigError(f"{place} has no key {key!r}{nearest(str(key), KEYS)}; there are {', '.join(KEYS)}")
    match, frozen = entry.get("match"), entry.get("frozen", False)
    if not isinstance(match, str) or not match:
        raise ConfigError(f"{place}.match={match!r}: must be a pattern of parameter names, such as 'head.*'")
    if not isinstance(frozen, bool):
        raise ConfigError(f"{place}.frozen={frozen!r}: must be true or false")
    scale, decay = _number(place, "lr_scale", entry, 1.0), _number(place, "weight_decay", entry, None)
    if frozen and (others := [key for key in ("lr_scale", "weight_decay") if key in entry]):
        raise ConfigError(f"{place}.{others[0]}={entry[others[0]]!r}: a frozen group is not trained; leave it out")
    return NamedGroup(match, 1.0 if scale is None else scale, decay, frozen)


def _number(place: str, key: str, entry: Mapping[str, Any], default: float | None) -> float | None:
    value = entry.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigError(f"{place}.{key}={value!r}: must be a finite number ≥ 0")
    return float(value)


def near(pattern: str, names: Mapping[str, object]) -> str:
    """Return the name nearest to a pattern, then the first names."""
    prefixes = {".".join(name.split(".")[:cut]) for name in names for cut in range(1, name.count(".") + 1)}
    kinds = [list(names), [f"{prefix}.*" for prefix in sorted(prefixes)]]
    hints = (nearest(pattern, kind) for kind in (kinds[::-1] if "*" in pattern else kinds))
    hint = next((hint for hint in hints if hint), "")
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{hint}; the model has {', '.join(list(names)[:SHOWN])}{more}"

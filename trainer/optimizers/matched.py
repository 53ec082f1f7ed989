"""Named optimizers of a config, `optimizer.optimizers`, each with the parameters that it matches."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from everstep.config import Node, RunConfig
from everstep.errors import ConfigError, nearest
from everstep.trainer.param_groups import near
from everstep.trainer.plugins import TARGET

ALTERNATING = "everstep.optimizers.Alternating"
KEYS = (TARGET, "optimizers", "turns")
MATCH = "match"
Matched = dict[str, tuple[Node, list[nn.Parameter]]]
"""By name: the node of the optimizer without its patterns, and its parameters that are not frozen."""


def matched_parameters(node: Node, model: nn.Module) -> Matched:
    """Match the entries of `optimizer.optimizers` with the model's parameters.

    Raises:
        ConfigError: an entry is wrong, names no parameter that is trained, or two name the same one.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    found: Matched = {}
    for name, entry in _entries(node).items():
        members = {}
        for pattern in _patterns(name, entry):
            fitting = [each for each in names if fnmatchcase(each, pattern) and names[each].requires_grad]
            if not fitting:
                raise ConfigError(
                    f"optimizer.optimizers.{name}.match={pattern!r}: matches no parameter that is trained"
                    f"{near(pattern, names)}"
                )
            members.update({id(names[each]): names[each] for each in fitting})
            _claim(owners, name, {each: id(names[each]) for each in fitting})
        # In the order of the model, on which the order of the groups and of their kernels depends.
        found[name] = (
            {key: value for key, value in entry.items() if key != MATCH},
            [p for p in model.parameters() if id(p) in members],
        )
    return found


def first_turn(run: RunConfig) -> str | None:
    """Return the turn of the first step by the config; None if no optimizers alternate."""
    node = run.optimizer or {}
    turns = node.get("turns")
    return str(turns[0]) if node.get(TARGET) == ALTERNATING and isinstance(turns, list) and turns else None


def _claim(owners: dict[int, str], name: str, parameters: Mapping[str, int]) -> None:
    for each, identity in parameters.items():
        if (other := owners.setdefault(identity, name)) != name:
            raise ConfigError(
                f"optimizer.optimizers: {each} is matched by {other} and by {name}; "
                "let the patterns of one leave it out"
            )


def _entries(node: Node) -> Mapping[str, Mapping[str, Any]]:
    for key in node:
        if key not in KEYS:
            raise ConfigError(
                f"optimizer.{key}={node[key]!r}: optimizers that alternate have no {key!r}"
                f"{nearest(str(key), KEYS[1:])}; give it to each of optimizer.optimizers, and compose with "
                "optimizer=alternating"
            )
    entries = node.get("optimizers")
    if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
        raise ConfigError(
            f"optimizer.optimizers={entries!r}: must be optimizers by name; write "
            "{critic: {match: 'critic.*', _target_: torch.optim.Adam, lr: 1e-4}}"
        )
    return entries


def _patterns(name: str, entry: Mapping[str, Any]) -> list[str]:
    match = entry.get(MATCH)
    patterns = [match] if isinstance(match, str) else match
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ConfigError(
            f"optimizer.optimizers.{name}.match={match!r}: must be a pattern of parameter names or a list of them; "
            f"write match: '{name}.*'"
        )
    return patterns

"""Configs of trials: a base config that is composed once and copied with the values of each trial.

Composing takes 50 ms, so it is done once for each combination of config groups that are swept.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.config import OPEN_NODES, RunConfig, meant
from everstep.errors import ConfigError
from everstep.frozen_config import keys


@dataclass
class Base:
    """A composed config; copies of it share what they do not change."""

    config: RunConfig
    _typed: dict[str, Any] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """Return a copy with dotted keys set, typed and checked by the rules of each group.

        Raises:
            ConfigError: a value does not fit its key.
        """
        tree: dict[str, Any] = {}
        for key, value in values.items():
            *above, last = key.split(".")
            place = tree
            for part in above:
                place = place.setdefault(part, {})
            place[last] = value
        try:
            changed: RunConfig = self._changed(self.config, tree, "")
            return changed
        except ValueError as error:
            told = ", ".join(f"{key}={value}" for key, value in values.items())
            raise ConfigError(f"trial {told}: {error}") from error

    def _changed(self, owner: Any, tree: Mapping[str, Any], prefix: str) -> Any:
        changed = {}
        for name, value in tree.items():
            current = getattr(owner, name)
            if dataclasses.is_dataclass(current) and isinstance(value, dict):
                changed[name] = self._changed(current, value, f"{prefix}{name}.")
            elif not prefix and name in OPEN_NODES and isinstance(value, dict):
                changed[name] = _within(copy.deepcopy(current) or {}, value)
            else:
                changed[name] = self._convert(owner, name, value, prefix)
        return dataclasses.replace(owner, **changed)

    def _convert(self, owner: Any, name: str, value: Any, prefix: str) -> Any:
        """Return the value in the type of the key: 1 becomes 1.0, "min" becomes Goal.min."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        known = f"{prefix}{name}={json.dumps(value, sort_keys=True)}"
        if known not in self._typed:
            node = self._typed.setdefault(type(owner).__name__, OmegaConf.structured(type(owner)))
            before = node[name]
            try:
                node[name] = value
                typed = node[name]
            except OmegaConfBaseException as error:
                raise ConfigError(f"{prefix}{name}={value!r}: {str(error).splitlines()[0]}") from error
            finally:
                node[name] = before
            self._typed[known] = OmegaConf.to_object(typed) if OmegaConf.is_config(typed) else typed
        return copy.deepcopy(self._typed[known])


def _within(node: dict[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in tree.items():
        below = node.get(name)
        node[name] = _within(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return node


def check_key(key: str) -> None:
    """Raise ConfigError for a key that no run has. Keys of a plug-in are left to its constructor."""
    known = keys()
    if key.split(".")[0] == "job":
        raise ConfigError(f"{key}: a job is the same for all trials of a sweep; start two sweeps")
    if key in ("run", "run_root"):
        raise ConfigError(f"{key} names the sweep, so it has one value")
    if key.split(".")[0] == "plugins":
        raise ConfigError(f"{key}: packages of your own are the same for all trials of a sweep")
    if key.split(".")[0] not in OPEN_NODES and key not in known:
        raise ConfigError(f"no key {key!r}{meant(key, known)}")

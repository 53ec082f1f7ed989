"""The state of a task and of hooks that have `state_dict()` and `load_state_dict()`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from everstep.config import Node
from everstep.errors import ConfigError
from everstep.trainer.plugins import TARGET
from everstep.trainer.state.model_state import nested_targets
from everstep.trainer.state.state_tree import pack, unpack

PREFIX = "plugins."


class PluginState:
    """Packs the plug-ins' `state_dict()` for a checkpoint, and calls their `load_state_dict()`."""

    def __init__(self, plugins: Mapping[str, object], device: torch.device) -> None:
        self.plugins = {key: plugin for key, plugin in plugins.items() if has_state(plugin, key)}
        self.device = device
        self._targets: dict[str, Tensor] = {}

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Add the tensors of all plug-ins to `tensors` as `plugins.KEY.NAME`; return the rest as JSON by key."""
        return {
            key: pack(dict(plugin.state_dict()), f"{PREFIX}{key}", tensors)  # type: ignore[attr-defined]
            for key, plugin in self.plugins.items()
        }

    def allocate(self, metadata: dcp.Metadata, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors to be filled from a checkpoint, by name."""
        self._targets = nested_targets(metadata, values, self.device)
        return self._targets

    def load(self, values: Mapping[str, Any]) -> None:
        """Pass the filled state to the plug-ins; state of a hook that the run no longer has is ignored."""
        for key, packed in values.items():
            if key in self.plugins:
                self.plugins[key].load_state_dict(unpack(packed, self._targets))  # type: ignore[attr-defined]
        self._targets = {}


def has_state(plugin: object, key: str) -> bool:
    """True if a plug-in has state to save.

    Raises:
        ConfigError: it has one of the two methods and not the other.
    """
    saves, loads = (callable(getattr(plugin, name, None)) for name in ("state_dict", "load_state_dict"))
    if saves != loads:
        there, lacking = ("state_dict", "load_state_dict") if saves else ("load_state_dict", "state_dict")
        raise ConfigError(f"{key} ({type(plugin).__name__}) has {there}() and no {lacking}(); give it both or none")
    return saves


def hook_keys(nodes: Iterable[Node]) -> list[str]:
    """Return the key of each hook's state, from its target, since a resume may add or remove hooks."""
    seen: Counter[str] = Counter()
    keys = []
    for node in nodes:
        key = f"hooks.{node[TARGET]}"
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}:{seen[key]}")
    return keys

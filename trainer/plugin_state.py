"""The state of a task and of hooks that have `state_dict()` and `load_state_dict()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from trainer.errors import CheckpointError, ConfigError
from trainer.model_state import empty
from trainer.state_tree import pack, tensor_entries, unpack

PREFIX = "plugins."


class PluginState:
    """Packs what plug-ins give, and hands back what a checkpoint holds."""

    def __init__(self, plugins: Mapping[str, object], device: torch.device) -> None:
        self.plugins = {key: plugin for key, plugin in plugins.items() if has_state(plugin, key)}
        self.device = device
        self._targets: dict[str, Tensor] = {}

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {
            key: pack(dict(plugin.state_dict()), f"{PREFIX}{key}", tensors)  # type: ignore[attr-defined]
            for key, plugin in self.plugins.items()
        }

    def allocate(self, metadata: dcp.Metadata, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors to be filled from a checkpoint, by name."""
        self._targets = {}
        for saved in tensor_entries(dict(values)):
            entry = metadata.state_dict_metadata.get(saved["tensor"])
            if not isinstance(entry, dcp.TensorStorageMetadata):
                raise CheckpointError(f"the checkpoint has no tensor {saved['tensor']}")
            self._targets[saved["tensor"]] = empty(entry, torch.device("cpu") if saved["on_host"] else self.device)
        return self._targets

    def load(self, values: Mapping[str, Any]) -> None:
        for key, packed in values.items():
            if key in self.plugins:
                self.plugins[key].load_state_dict(unpack(packed, self._targets))  # type: ignore[attr-defined]
        self._targets = {}


def has_state(plugin: object, key: str) -> bool:
    """True if a plug-in is to be saved.

    Raises:
        ConfigError: it has one of the two methods and not the other.
    """
    saves, loads = (callable(getattr(plugin, name, None)) for name in ("state_dict", "load_state_dict"))
    if saves != loads:
        there, lacking = ("state_dict", "load_state_dict") if saves else ("load_state_dict", "state_dict")
        raise ConfigError(f"{key} ({type(plugin).__name__}) has {there}() and no {lacking}(); give it both or none")
    return saves

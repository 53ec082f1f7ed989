"""State of a run in a checkpoint: tensors for torch.distributed.checkpoint, the rest as JSON.

The JSON is part of the manifest.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.tensor import DTensor

from everstep.errors import CheckpointError, ConfigError
from everstep.trainer.distributed.agreement import agree, differing
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.optim import WeightEma
from everstep.trainer.state.attributes import Attributes
from everstep.trainer.state.buffer_sync import BufferSync
from everstep.trainer.state.model_state import ModelState
from everstep.trainer.state.optimizer_state import OptimizerState
from everstep.trainer.state.plugin_state import PluginState, has_state

SHOWN = 3
"""Names that an error lists; the others are counted."""
LONGEST = 200
"""Characters of a checkpoint's text that a message shows."""


@dataclass
class Progress:
    """Position and counters of a run; the next batch starts at sample `step × global_batch`."""

    step: int = 0
    items: int = 0
    """Items (samples, tokens …) that the loss was summed over so far."""
    micro_batch: int = 0
    """Samples that one process passes through the model at once; less than configured after out-of-memory."""
    evaluated: int = -1
    """The step of the last evaluation."""
    metric: float | None = None
    """Value of the metric in the last evaluation."""
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    """Evaluations in a row without a better metric."""
    nonfinite: int = 0
    """Steps (or rollbacks) in a row because of NaN or Inf."""
    overflows: int = 0
    """Steps so far that overflowed in fp16, after which the loss scale was halved."""
    empty: int = 0
    """Steps so far whose batches had no item that counts in the loss."""
    passed_over: list[list[int]] = field(default_factory=list)
    """Steps [first, last] whose batches a rollback left out."""

    def samples(self, global_batch: int) -> int:
        return self.step * global_batch


class LossScale:
    """fp16's loss scale on the device: halves after an overflow, doubles after `interval` good steps."""

    def __init__(self, scale: float, interval: int, device: torch.device) -> None:
        self.interval = interval
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.good_steps = torch.tensor(0, dtype=torch.int32, device=device)

    def update(self, overflow: Tensor, empty: Tensor) -> None:
        """Set the scale after a step.

        Args:
            overflow: 1.0 if the step had NaN or Inf, else 0.0.
            empty: True if it had no item that counts: then it is neither good nor bad.
        """
        scale, good_steps = self.scale.clone(), self.good_steps.clone()
        torch._amp_update_scale_(self.scale, self.good_steps, overflow, 2.0, 0.5, self.interval)
        self.scale.copy_(torch.where(empty, scale, self.scale))
        self.good_steps.copy_(torch.where(empty, good_steps, self.good_steps))


@dataclass(frozen=True)
class Packed:
    """State as it is saved: live tensors by name, and JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass
class TrainState:
    """State of a run: the model as the task made it (before any wrapper), its optimizer, and the rest."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    average: WeightEma | None = None
    scale: LossScale | None = None
    buffers: BufferSync | None = None
    plugins: Mapping[str, object] = field(default_factory=dict)
    """The task and the hooks, by their keys."""

    def __post_init__(self) -> None:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        stateless = {key: plugin for key, plugin in self.plugins.items() if not has_state(plugin, key)}
        self._model = ModelState(self.model)
        self._optimizer = OptimizerState(self.model, self.optimizer)
        self._plugins = PluginState(self.plugins, device)
        self.attributes = Attributes({"model": self.model, "optimizer": self.optimizer, **stateless})
        self._trained = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        """Parameters by name: True if they were trained when the optimizer was made."""
        self.passes: set[str] = set()
        """Plain attributes that forward passes change."""
        self.world_dependent = ""
        """Cause of a loss that depends on the number of processes; empty if none is known."""
        self._read: dict[str, Tensor] = {}

    def pack(self) -> Packed:
        """Return the whole state, by names that do not depend on how the model is parallelized.

        Raises:
            CheckpointError: a part has a type that a checkpoint cannot hold; the message names it.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {
            "model": self._model.pack(tensors),
            "optimizer": self._optimizer.pack(tensors),
            "plugins": self._plugins.pack(tensors),
            "attributes": self.attributes.pack(tensors),
            "frozen": self._frozen(),
        }
        if self.buffers is not None:
            values["buffers"] = self.buffers.changing
        values["passes"] = sorted(self.passes)
        values["world_dependent"] = self.world_dependent
        return Packed(tensors | self._own_tensors(), {key: value for key, value in values.items() if value})

    def tensors(self) -> dict[str, Tensor]:
        return self.pack().tensors

    def numbers(self) -> dict[str, Any]:
        return asdict(self.progress)

    def prepare(self, metadata: dcp.Metadata, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Allocate the tensors that a checkpoint fills; return them by name.

        Raises:
            CheckpointError: the checkpoint's names or shapes are not those of the state.
        """
        own = self._own_tensors()
        _check_own(own, metadata)
        with _readable():
            self._read = self.attributes.allocate(metadata, values.get("attributes", {}))
            return {
                **self._model.allocate(metadata, values.get("model", {})),
                **self._optimizer.allocate(metadata, values.get("optimizer", {})),
                **self._plugins.allocate(metadata, values.get("plugins", {})),
                **self._read,
                **own,
            }

    def load(self, values: Mapping[str, Any]) -> None:
        """Set the tensors of `prepare`, filled since, and the values that are no tensors, in the state."""
        with _readable():
            self._model.load(values.get("model", {}))
            self._optimizer.load(values.get("optimizer", {}))
            self.attributes.load(values.get("attributes", {}), self._read)
            self._freeze(values.get("frozen", []))
            self.passes.update(values.get("passes", []))
            self.world_dependent = str(values.get("world_dependent", ""))[:LONGEST]
            if self.buffers is not None:
                self.buffers.restore(values.get("buffers", []))
        self._plugins.load(values.get("plugins", {}))
        self._read = {}

    def _frozen(self) -> list[str]:
        """Return the parameters that were trained at first and have been frozen since.

        Raises:
            CheckpointError: one was frozen at first and has been unfrozen since, so no optimizer trains it.
        """
        frozen = []
        for name, parameter in self.model.named_parameters():
            trained = self._trained.get(name, parameter.requires_grad)
            if parameter.requires_grad and not trained:
                raise CheckpointError(
                    f"model.{name} was frozen when the optimizer was made and has been unfrozen since, so nothing "
                    "trains it: build it with requires_grad=True and freeze it in the first forward pass, or train "
                    "the rest in a run of its own (init_from)"
                )
            if trained and not parameter.requires_grad:
                frozen.append(name)
        return frozen

    def _freeze(self, names: Sequence[str]) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self._trained:
                parameter.requires_grad_(self._trained[name] and name not in names)

    def _own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the moving average and the loss scale."""
        own: dict[str, Tensor] = {}
        if self.average is not None:
            own |= {f"average.{name}": value for name, value in self.average.shadow.items()}
        if self.scale is not None:
            own |= {"scale.scale": self.scale.scale, "scale.good_steps": self.scale.good_steps}
        return own

    def check_agreement(self, mesh: Mesh) -> None:
        """Raise ConfigError on all ranks if they differ in state of which a checkpoint holds one copy.

        Buffers, which `BufferSync` makes equal, shards and the counters of plug-ins are not compared.
        """
        if mesh.world == 1:
            return
        packed = self.pack()
        buffers = {f"model.{name}" for name, _ in self.model.named_buffers()}
        whole = {n: t for n, t in packed.tensors.items() if not isinstance(t, DTensor) and n not in buffers}
        names = sorted(f"{name} {list(tensor.shape)}" for name, tensor in whole.items())
        if not agree(names, mesh):
            found = Counter(name for others in mesh.gather(names) for name in others)
            odd = min(name for name in found if found[name] < mesh.world)
            raise ConfigError(f"the state has {odd} on some ranks only; a checkpoint holds what all ranks have")
        _check_equal(differing(whole, mesh))
        for part in ("model", "optimizer"):
            if not agree(packed.values.get(part, {}), mesh):
                raise ConfigError(f"the {part} keeps values (no tensors) that differ between ranks: {DIFFERS}")


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Raise errors of a manifest's values, which another process may have written, as CheckpointError."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the manifest holds values that do not fit the model or its optimizer: {type(error).__name__}: {error}"
        ) from error


DIFFERS = (
    "a checkpoint holds one copy, so this run could not be resumed as it was; checkpoint.self_test=false allows it"
)


def _check_equal(names: list[str]) -> None:
    if not names:
        return
    more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    shown = ", ".join(names[:SHOWN]) + more
    if any(name.startswith("model.") for name in names):
        raise ConfigError(
            f"the ranks hold different values of {shown}: their gradients were not reduced. In task.loss call "
            "model(...) itself, and not model.module, a method of the model or one of its parts"
        )
    raise ConfigError(f"the ranks hold different values of {shown}: {DIFFERS}")


def _check_own(own: Mapping[str, Tensor], metadata: dcp.Metadata) -> None:
    missing = sorted(own.keys() - metadata.state_dict_metadata.keys())
    if missing:
        raise CheckpointError(f"the checkpoint has no {missing[0]} ({len(missing)} tensors are missing)")
    for name, tensor in own.items():
        entry = metadata.state_dict_metadata[name]
        if isinstance(entry, dcp.TensorStorageMetadata) and entry.size != tensor.shape:
            raise CheckpointError(f"{name} is {list(entry.size)} in the checkpoint, {list(tensor.shape)} in the model")

"""All that a checkpoint holds: tensors for torch.distributed.checkpoint, plain numbers for the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp

from trainer.errors import CheckpointError
from trainer.optim import Average


@dataclass
class Progress:
    """Where a run is. Position is one integer: the next batch starts at sample `step × global_batch`."""

    step: int = 0
    items: int = 0
    """Items (samples, tokens …) that the loss was summed over so far."""
    micro_batch: int = 0
    """Samples that one process passes through the model at once; less than configured after out-of-memory."""
    evaluated: int = -1
    """The step of the last evaluation."""
    metric: float | None = None
    """What the last evaluation measured."""
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    """Evaluations in a row without a better metric."""
    nonfinite: int = 0
    """Steps (or rollbacks) so far because of NaN or Inf."""
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

    def update(self, overflow: Tensor) -> None:
        """Args: overflow: 1.0 where the step had NaN or Inf, else 0.0."""
        torch._amp_update_scale_(self.scale, self.good_steps, overflow, 2.0, 0.5, self.interval)


@dataclass
class TrainState:
    """The model as the task made it (before any wrapper), its optimizer, and the rest."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    average: Average | None = None
    scale: LossScale | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by a name that does not depend on how the model is spread."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items() if _is_tensor(name, value)}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    named[f"optimizer.{name}.{key}"] = value
        if self.average is not None:
            named |= {f"average.{name}": value for name, value in self.average.shadow.items()}
        if self.scale is not None:
            named |= {"scale.scale": self.scale.scale, "scale.good_steps": self.scale.good_steps}
        return named

    def scalars(self) -> dict[str, float]:
        """Optimizer state that is a plain number."""
        return {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, int | float)
        }

    def numbers(self) -> dict[str, Any]:
        return asdict(self.progress)

    def prepare(self, metadata: dcp.Metadata, scalars: dict[str, float]) -> dict[str, Tensor]:
        """Make room for the optimizer state that a checkpoint holds, and name all tensors to be loaded."""
        self.optimizer.state.clear()
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer.{name}."
            if id(parameter) not in groups:
                continue
            state = self.optimizer.state[parameter]
            for full, entry in metadata.state_dict_metadata.items():
                if full.startswith(prefix) and isinstance(entry, dcp.TensorStorageMetadata):
                    state[full.removeprefix(prefix)] = _room(entry, parameter, groups[id(parameter)])
            state |= {full.removeprefix(prefix): v for full, v in scalars.items() if full.startswith(prefix)}
        wanted = self.tensors()
        missing = sorted(wanted.keys() - metadata.state_dict_metadata.keys())
        if missing:
            raise CheckpointError(f"the checkpoint has no {missing[0]} ({len(missing)} tensors are missing)")
        for name, tensor in wanted.items():
            entry = metadata.state_dict_metadata[name]
            if isinstance(entry, dcp.TensorStorageMetadata) and entry.size != tensor.shape:
                raise CheckpointError(
                    f"{name} is {list(entry.size)} in the checkpoint, {list(tensor.shape)} in the model"
                )
        return wanted


def _is_tensor(name: str, value: object) -> bool:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"the model's state {name!r} is a {type(value).__name__}; only tensors can be saved")
    return True


def _room(entry: dcp.TensorStorageMetadata, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """An empty tensor for one piece of optimizer state: like its parameter, or small and whole on every rank."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape and parameter.dim() > 0:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    on_device = group.get("fused") or group.get("capturable") or entry.size != torch.Size([])
    return torch.empty(entry.size, dtype=dtype, device=parameter.device if on_device else "cpu")

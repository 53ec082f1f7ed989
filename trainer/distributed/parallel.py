"""Parallelism of one model over the mesh: one process, replicated (DDP), sharded (FSDP2) or HSDP.

All of them reduce gradients to a mean over ranks; `ParallelModel.ranks` undoes it, since the step divides by the global
count of items, never by the world size. The model keeps the parameter names of its task, whatever wraps it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from everstep.config import ParallelConfig, PrecisionConfig
from everstep.errors import ConfigError
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.model_factory import (
    COMPUTE,
    batch_dtype,
    compile_module,
    is_sharded,
    prepare_units,
    seeded_model,
    sharded_on_meta,
    shares_modules,
)
from everstep.trainer.distributed.sharding import hand_out, materialise, whole_parameters
from everstep.trainer.optim import local


class Replicated(DistributedDataParallel):
    """DDP that passes on attributes of the task's model (`model.config`, `model.logit_scale`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass
class ParallelModel:
    """A model that is ready to train: `model` owns the parameters, `module` is what the task calls."""

    model: nn.Module
    module: nn.Module
    mesh: Mesh
    autocast: Callable[[], AbstractContextManager[Any]]
    ranks: int
    """Number of ranks, by which the reduction divides the gradients."""
    whole: list[nn.Parameter] = field(default_factory=list)
    """Parameters of a sharded model that each rank holds whole; `reduce_whole` reduces their gradients."""
    units: str = ""
    """Line for the user: the units of FSDP or activation checkpointing."""
    cast: torch.dtype | None = None
    """Type that the floats of a batch are cast to; None leaves them as they are."""
    compiles: bool = False
    """True if torch.compile compiles the model, for each new shape of its inputs."""

    @property
    def waits_forward(self) -> bool:
        """True if a forward pass may wait for other ranks outside of the gathers of `gathering`."""
        if any("SyncBatchNorm" in type(inner).__name__ for inner in self.model.modules()):
            return True
        if self.gathering:
            return self.compiles  # the hooks of a compiled unit may be part of its graph
        return not isinstance(self.module, DistributedDataParallel)

    @property
    def gathering(self) -> list[nn.Module]:
        """Units that gather their parameters from all ranks in a hook before their forward pass."""
        return [inner for inner in self.model.modules() if isinstance(inner, FSDPModule)]

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one microbatch: gradients are reduced with the step's last one.

        FSDP shards the gradients of each microbatch at once, since a rank would otherwise hold all of them; only the
        reduction over replicas waits for the last.
        """
        if isinstance(self.module, DistributedDataParallel):
            return nullcontext() if last else self.module.no_sync()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(last)
        return nullcontext()

    def reduce_whole(self) -> None:
        """Reduce the gradients of the parameters that FSDP left whole to their mean over ranks."""
        for parameter in self.whole:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.mesh.world

    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients; of a sparse one the values, which share its memory."""
        return [_dense(p) for p in self._parameters if p.grad is not None]

    def count_gradients(self) -> int:
        return sum(p.grad is not None for p in self._parameters)

    def without_gradient(self) -> list[str]:
        """Return the names of the parameters that are trained and got no gradient."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]

    def drop_gradients(self) -> None:
        """Set all gradients to None, as `optimizer.zero_grad()` does, without its work for the profiler."""
        for parameter in self._parameters:
            parameter.grad = None

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        """The model's parameters, collected once: the walk costs more than a small model's update."""
        return list(self.model.parameters())

    @cached_property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.requires_grad for p in self._parameters)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the 2-norm of the whole model's gradient, the same on all ranks."""
        if self.mesh.grid is None:
            return _norm(gradients, self.mesh.device)
        whole = [p.grad for p in self.whole if p.grad is not None]
        known = {id(gradient) for gradient in whole}
        square = _norm([g for g in gradients if id(g) not in known], self.mesh.device).square()
        dist.all_reduce(square, group=self.mesh.grid.get_group("shard"))
        return (square + _norm(whole, self.mesh.device).square()).sqrt()

    def norms(self) -> Tensor:
        """Return the 2-norm of each parameter's whole gradient, in the order of the parameters; 0 without one."""
        none = torch.zeros(1, device=self.mesh.device)
        gradients = [none if p.grad is None else _dense(p) for p in self._parameters]
        squares = torch.stack([norm.double() for norm in torch._foreach_norm(gradients)]).square()
        if self.mesh.grid is not None:
            known = {id(p) for p in self.whole}
            whole = torch.tensor([id(p) in known for p in self._parameters], device=self.mesh.device)
            shards = torch.where(whole, 0.0, squares)
            dist.all_reduce(shards, group=self.mesh.grid.get_group("shard"))
            squares = torch.where(whole, squares, shards)
        return squares.sqrt()


def _dense(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is not None and gradient.is_sparse:
        gradient = parameter.grad = gradient.coalesce()
        return gradient._values()
    return local(gradient)  # type: ignore[arg-type]


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = list(torch._foreach_norm(gradients))
    if any(each.dtype != norms[0].dtype for each in norms):
        norms = [each.to(torch.float64 if each.dtype is torch.float64 else torch.float32) for each in norms]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def parallelize(
    build: Callable[[], nn.Module],
    mesh: Mesh,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    fresh: bool,
    seed: int,
) -> ParallelModel:
    """Build the model and lay it out over the ranks.

    The weights of a fresh run come from `seed` alone, so they are the same for any world size. A sharded model is made
    without memory for its parameters; rank 0 alone makes the weights, on the CPU, and sends each rank its shard.

    Args:
        build: makes the model as the task defines it.
        fresh: True if weights are needed; False when a checkpoint is about to be loaded.
    """
    autocast, cast = _autocast(mesh, precision), batch_dtype(precision)
    if not is_sharded(mesh, parallel):
        model = seeded_model(build, seed, precision, parallel).to(mesh.device)
        units = prepare_units(model, parallel)
        compile_module(model, parallel)
        module = _replicate(model, mesh, parallel)
        shown = units if parallel.checkpoint_blocks else ""
        compiles = parallel.compile is not None
        return ParallelModel(model, module, mesh, autocast, mesh.world, units=shown, cast=cast, compiles=compiles)
    model, units = sharded_on_meta(build, mesh, parallel, precision, seed)
    materialise(model, mesh.device)
    if fresh:
        _send_weights(lambda: seeded_model(build, seed, precision, parallel), model, mesh, parallel)
    # A model that ends in a view (`…[:, 0]`) is common, and the loss is not an in-place operation.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Autocast as well, for operations on tensors that are not sharded (buffers, inputs): all kinds compute alike.
    whole = whole_parameters(model)
    return ParallelModel(model, model, mesh, autocast, mesh.world, whole, units, cast, parallel.compile is not None)


def _send_weights(build: Callable[[], nn.Module], model: nn.Module, mesh: Mesh, parallel: ParallelConfig) -> None:
    """Make the weights on rank 0, and send each rank its shard; an error of rank 0 is raised on all ranks."""
    made: list[nn.Module] = []

    def make() -> None:
        made.append(build())
        if shares_modules(made[0], model):
            kind = parallel.kind.value
            raise ConfigError(
                f"parallel={kind}: task.model() gives the same modules at each call; make them in model()"
            )

    mesh.decide(make)
    hand_out(made[0] if made else None, model, mesh)


def _replicate(model: nn.Module, mesh: Mesh, parallel: ParallelConfig) -> nn.Module:
    if mesh.world == 1:
        return model
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("the model has no parameters to train; change model or task")
    # Buffers are left to BufferSync: DDP would write into those that overlap in memory.
    names = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
    # The two strides describe the same memory (a convolution with one input channel): nothing for a user to fix.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # The argument that replaces broadcast_buffers is missing in the oldest supported torch.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return Replicated(
            model,
            device_ids=[mesh.device.index] if mesh.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=parallel.bucket_mb,
            find_unused_parameters=parallel.find_unused,
        )


def _autocast(mesh: Mesh, precision: PrecisionConfig) -> Callable[[], AbstractContextManager[Any]]:
    dtype = COMPUTE[precision.dtype]
    return nullcontext if dtype is None else functools.partial(torch.autocast, mesh.device.type, dtype)

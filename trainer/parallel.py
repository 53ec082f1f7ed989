"""How one model is spread over the mesh: on one process, replicated (DDP), sharded (FSDP2) or both (HSDP).

All of them reduce gradients to a mean over ranks; `Spread.ranks` undoes it, since the step divides by the global count
of items, never by the world. The model keeps the parameter names that its task gave it, whatever wraps it.
"""

from __future__ import annotations

import copy
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
from torch.utils.checkpoint import checkpoint

from trainer import sync_batchnorm
from trainer.config import Dtype, ParallelConfig, ParallelKind, PrecisionConfig
from trainer.errors import ConfigError
from trainer.generators import seed_generators
from trainer.mesh import Mesh
from trainer.optim import local
from trainer.preserve import generators_preserved
from trainer.sharding import (
    check_shardable,
    hand_out,
    materialise,
    parameters_on_meta,
    put_back_tags,
    shard,
    tags_of,
)
from trainer.units import describe_units, find_units, shardable_units

COMPUTE = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: None, Dtype.fp64: None}


class Replicated(DistributedDataParallel):
    """DDP that lets a task reach the attributes of the model that it made (`model.config`, `model.logit_scale`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass
class Spread:
    """A model that is ready to train: `model` owns the parameters, `module` is what the task calls."""

    model: nn.Module
    module: nn.Module
    mesh: Mesh
    autocast: Callable[[], AbstractContextManager[Any]]
    ranks: int
    """What the gradients were divided by when they were reduced."""
    whole: list[nn.Parameter] = field(default_factory=list)
    """Parameters of a sharded model that every rank has all of; their gradients are reduced by `reduce_whole`."""
    units: str = ""
    """How the model was cut for FSDP or activation checkpointing, for people."""

    def reduce_on(self, last: bool) -> AbstractContextManager[Any]:
        """Around one microbatch: gradients are reduced over the ranks with the step's last one.

        FSDP shards the gradients of each microbatch at once, or a rank would hold all of them; only the reduction
        over replicas waits for the last.
        """
        if isinstance(self.module, DistributedDataParallel):
            return nullcontext() if last else self.module.no_sync()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(last)
        return nullcontext()

    def reduce_whole(self) -> None:
        """Reduce the gradients of what FSDP left whole to their mean over ranks, as it does those of the shards."""
        for parameter in self.whole:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.mesh.world

    def gradients(self) -> list[Tensor]:
        """This rank's gradients; of a sparse one the values, which share its memory."""
        return [_dense(p) for p in self._parameters if p.grad is not None]

    def count_gradients(self) -> int:
        return sum(p.grad is not None for p in self._parameters)

    def without_gradient(self) -> list[str]:
        """Names of the parameters that are trained and got no gradient."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]

    def drop_gradients(self) -> None:
        """What `optimizer.zero_grad()` does, without its work for the profiler."""
        for parameter in self._parameters:
            parameter.grad = None

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        """A walk through the modules costs more than a small model's update, so there is one only."""
        return list(self.model.parameters())

    @cached_property
    def trained(self) -> int:
        """How many parameters are trained."""
        return sum(p.requires_grad for p in self._parameters)

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm of the whole model's gradient, the same on all ranks."""
        if self.mesh.grid is None:
            return _norm(gradients, self.mesh.device)
        whole = [p.grad for p in self.whole if p.grad is not None]
        known = {id(gradient) for gradient in whole}
        square = _norm([g for g in gradients if id(g) not in known], self.mesh.device).square()
        dist.all_reduce(square, group=self.mesh.grid.get_group("shard"))
        return (square + _norm(whole, self.mesh.device).square()).sqrt()


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


def spread(build: Callable[[], nn.Module], mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig,
           *, fresh: bool, seed: int) -> Spread:  # fmt: skip
    """Build the model and spread it.

    The weights of a fresh run come from `seed` alone, so they are the same on any world. A sharded model is made
    without memory for its parameters; rank 0 alone makes the weights, on the CPU, and hands out the shards.

    Args:
        build: makes the model as the task defines it.
        fresh: whether weights are needed; False when a checkpoint is about to be loaded.
    """
    autocast = _autocast(mesh, precision)
    if not is_sharded(mesh, parallel):
        model = seeded(build, seed, precision, parallel).to(mesh.device)
        units = prepare_units(model, parallel)
        compile_module(model, parallel)
        module = _replicate(model, mesh, parallel)
        return Spread(model, module, mesh, autocast, mesh.world, units=units if parallel.checkpoint_blocks else "")
    model, whole, units = sharded_on_meta(build, mesh, parallel, precision, seed)
    tags = tags_of(model)
    materialise(model, mesh.device)
    put_back_tags(model, tags)
    if fresh:
        whole_model = seeded(build, seed, precision, parallel) if mesh.is_main else None
        if whole_model is not None and shares_modules(whole_model, model):
            kind = parallel.kind.value
            raise ConfigError(
                f"parallel={kind}: task.model() gives the same modules at each call; make them in model()"
            )
        hand_out(whole_model, model, mesh)
    # A model that ends in a view (`…[:, 0]`) is the rule; the loss is no operation in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Autocast as well, for the operations that meet what is not sharded (buffers, inputs): all kinds compute alike.
    whole = [p for p in model.parameters() if p in set(whole) or not _is_sharded(p)]
    return Spread(model, model, mesh, autocast, mesh.world, whole, units)


def is_sharded(mesh: Mesh, parallel: ParallelConfig) -> bool:
    return parallel.kind in (ParallelKind.fsdp, ParallelKind.hsdp) and mesh.grid is not None


def second_copy(build: Callable[[], nn.Module], live: nn.Module, mesh: Mesh, parallel: ParallelConfig,
                precision: PrecisionConfig, seed: int) -> nn.Module:  # fmt: skip
    """A second model with memory for a checkpoint and no values: sharded as the run's, or whole and on the CPU.

    Args:
        live: the model that trains; a factory that gives the same modules again is answered with a copy of it.
    """
    with generators_preserved():
        if is_sharded(mesh, parallel):
            model, device = sharded_on_meta(build, mesh, parallel, precision, seed)[0], mesh.device
        else:
            device = torch.device("cpu")
            try:
                with parameters_on_meta():
                    model = seeded(build, seed, precision, parallel)
            except Exception:  # a factory that looks at its weights
                return seeded(build, seed, precision, parallel)
            if shares_modules(model, live):
                return copy.deepcopy(live)
        tags = tags_of(model)
        materialise(model, device)
        put_back_tags(model, tags)
    return model


def shares_modules(one: nn.Module, other: nn.Module) -> bool:
    return bool({id(module) for module in one.modules()} & {id(module) for module in other.modules()})


def _is_sharded(parameter: Tensor) -> bool:
    return parameter is not local(parameter)


def sharded_on_meta(build: Callable[[], nn.Module], mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig,
                    seed: int) -> tuple[nn.Module, list[nn.Parameter], str]:  # fmt: skip
    """The model with this rank's shards of its parameters, which have no memory yet; what stays whole; its units."""
    try:
        with parameters_on_meta():
            model = seeded(build, seed, precision, parallel)
    except Exception:  # a factory that looks at its weights: then each process makes all of them
        model = seeded(build, seed, precision, parallel).to(mesh.device)
    check_shardable(model, parallel.kind.value)
    prepare_units(model, parallel)
    line = describe_units(model, shardable_units(model, find_units(model, parallel.wrap)))
    tags = tags_of(model)
    whole = shard(model, mesh, parallel, COMPUTE[precision.dtype], lambda unit: compile_module(unit, parallel))
    put_back_tags(model, tags)
    if whole:
        line += f"; {len(whole)} parameters stay whole on each process"
    return model, whole, line


def seeded(
    build: Callable[[], nn.Module], seed: int, precision: PrecisionConfig, parallel: ParallelConfig
) -> nn.Module:
    seed_generators(seed)
    model = build()
    if parallel.sync_batchnorm:
        model = sync_batchnorm.convert(model)
    return model.double() if precision.dtype is Dtype.fp64 else model


def prepare_units(model: nn.Module, parallel: ParallelConfig) -> str:
    """Have activation checkpointing recompute every n-th unit; a line that says which units there are."""
    every, units = parallel.checkpoint_blocks, find_units(model, parallel.wrap)
    if every and not units:
        raise ConfigError(
            f"parallel.checkpoint_blocks={every}: the model has no repeated blocks that can be found; name its units "
            "by parallel.wrap=[ClassName], or set it to 0"
        )
    outer = [u for path, u in units.items() if not any(path.startswith(f"{other}.") for other in units)]
    for number, unit in enumerate(outer):
        if every and number % every == 0:
            # In place of a wrapper module, which would change the names of the parameters.
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
    return describe_units(model, units)


def compile_module(model: nn.Module, parallel: ParallelConfig) -> None:
    if parallel.compile is not None:
        known = [*torch.compiler.list_backends(), "eager", "aot_eager"]
        if parallel.compile not in known:
            raise ConfigError(f"parallel.compile={parallel.compile!r}: there is no such backend ({', '.join(known)})")
        model.compile(backend=parallel.compile)


def _replicate(model: nn.Module, mesh: Mesh, parallel: ParallelConfig) -> nn.Module:
    if mesh.world == 1:
        return model
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("the model has no parameters to train; change model or task")
    # Buffers are left to BufferSync: DDP would write into those that overlap in memory.
    names = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
    # Two layouts of one memory, for a convolution with one input channel: nothing that a user could mend.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # The argument that replaces broadcast_buffers is not in the oldest torch that we support.
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

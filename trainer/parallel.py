"""How one model is spread over the mesh: on one process, replicated (DDP), sharded (FSDP2) or both (HSDP).

All of them reduce gradients to a mean over ranks; `Spread.ranks` undoes it, since the step divides by the global count
of items, never by the world. The model keeps the parameter names that its task gave it, whatever wraps it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trainer.config import Dtype, ParallelConfig, ParallelKind, PrecisionConfig
from trainer.errors import ConfigError
from trainer.mesh import Mesh
from trainer.optim import local

COMPUTE = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: None, Dtype.fp64: None}


@dataclass
class Spread:
    """A model that is ready to train: `model` owns the parameters, `module` is what the task calls."""

    model: nn.Module
    module: nn.Module
    mesh: Mesh
    autocast: Callable[[], AbstractContextManager[Any]]
    ranks: int
    """What the gradients were divided by when they were reduced."""

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

    def gradients(self) -> list[Tensor]:
        """This rank's gradients."""
        return [local(p.grad) for p in self._parameters if p.grad is not None]

    def drop_gradients(self) -> None:
        """What `optimizer.zero_grad()` does, without its work for the profiler."""
        for parameter in self._parameters:
            parameter.grad = None

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        """A walk through the modules costs more than a small model's update, so there is one only."""
        return list(self.model.parameters())

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The 2-norm of the whole model's gradient, the same on all ranks."""
        if not gradients:
            return torch.zeros((), device=self.mesh.device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.mesh.grid is None:
            return norm
        square: Tensor = norm.square()
        dist.all_reduce(square, group=self.mesh.grid.get_group("shard"))
        return square.sqrt()


def spread(build: Callable[[], nn.Module], mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig,
           *, fresh: bool, seed: int) -> Spread:  # fmt: skip
    """Build the model and spread it.

    The weights of a fresh run come from `seed` alone, so they are the same on any world. A sharded model is made
    without memory for its parameters; rank 0 alone makes the weights, on the CPU, and hands out the shards.

    Args:
        build: makes the model as the task defines it.
        fresh: whether weights are needed; False when a checkpoint is about to be loaded.
    """
    sharded = parallel.kind in (ParallelKind.fsdp, ParallelKind.hsdp) and mesh.grid is not None
    if not sharded:
        model = _seeded(build, seed, precision).to(mesh.device)
        _prepare_blocks(model, parallel)
        _compile(model, parallel)
        return Spread(model, _replicate(model, mesh, parallel), mesh, _autocast(mesh, precision), mesh.world)
    model = sharded_on_meta(build, mesh, parallel, precision, seed)
    _materialise(model, mesh)
    if fresh:
        _hand_out(build, model, mesh, seed, precision)
    # Autocast as well, for the operations that meet what is not sharded (buffers, inputs): all kinds compute alike.
    return Spread(model, model, mesh, _autocast(mesh, precision), mesh.world)


def sharded_on_meta(build: Callable[[], nn.Module], mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig,
                    seed: int) -> nn.Module:  # fmt: skip
    """The model with this rank's shards of its parameters, which have no memory yet."""
    with parameters_on_meta():
        model = _seeded(build, seed, precision)
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"parallel={parallel.kind.value}: the model has no parameters to shard; use parallel=ddp")
    _check_untied(model)
    _prepare_blocks(model, parallel)
    _shard(model, mesh, parallel, precision)
    return model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Make modules whose parameters have shape and type but no memory; buffers are made as ever."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = type(param)(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _seeded(build: Callable[[], nn.Module], seed: int, precision: PrecisionConfig) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    return model.double() if precision.dtype is Dtype.fp64 else model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The units that are sharded and recomputed one by one: the model's `blocks`, if it has them."""
    blocks = getattr(model, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def _prepare_blocks(model: nn.Module, parallel: ParallelConfig) -> None:
    every = parallel.checkpoint_blocks
    if every and not blocks_of(model):
        raise ConfigError(
            f"parallel.checkpoint_blocks={every}: the model has no ModuleList named `blocks`; set it to 0"
        )
    for number, block in enumerate(blocks_of(model)):
        if every and number % every == 0:
            # In place of a wrapper module, which would change the names of the parameters.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _compile(model: nn.Module, parallel: ParallelConfig) -> None:
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
    # Buffers are functions of the weights or constants: nothing to broadcast. Running statistics would differ per rank.
    # Two layouts of one memory, for a convolution with one input channel: nothing that a user could mend.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # The argument that replaces broadcast_buffers is not in the oldest torch that we support.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(
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


def _shard(model: nn.Module, mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    dtype = COMPUTE[precision.dtype]
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    # What leaves the model is what losses are summed from, so it leaves in full precision.
    outer = MixedPrecisionPolicy(inner.param_dtype, inner.reduce_dtype, None if dtype is None else torch.float32)
    for block in blocks_of(model):
        _compile(block, parallel)
        fully_shard(block, mesh=mesh.grid, mp_policy=inner)
    if not blocks_of(model):
        _compile(model, parallel)
    fully_shard(model, mesh=mesh.grid, mp_policy=outer)


def _materialise(model: nn.Module, mesh: Mesh) -> None:
    """Give this rank's shards memory; the buffers keep what their module put there, which `to_empty` would lose."""
    kept = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=mesh.device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])


def _hand_out(build: Callable[[], nn.Module], model: nn.Module, mesh: Mesh, seed: int,
              precision: PrecisionConfig) -> None:  # fmt: skip
    """Rank 0 makes the weights; every rank takes its shard, one parameter at a time."""
    whole = _seeded(build, seed, precision) if mesh.is_main else None
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=mesh.device)
            if whole is not None:
                full.copy_(attrgetter(name)(whole))
            dist.broadcast(full, src=0)
            assign(tensor, full)


def assign(tensor: Tensor, full: Tensor) -> None:
    """Set a tensor, or this rank's shard of it, to the values of a whole tensor that this rank holds."""
    if isinstance(tensor, DTensor):
        full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    local(tensor.detach()).copy_(full)


def _check_untied(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            tied = f"{name} and {owners[id(parameter)]} are one parameter"
            raise ConfigError(f"{tied}: tied weights cannot be sharded; use parallel=ddp")
        owners[id(parameter)] = name

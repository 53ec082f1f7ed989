"""Models of the task's factory: seeded, without memory, sharded, or as a second copy."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from everstep.config import Dtype, ParallelConfig, ParallelKind, PrecisionConfig
from everstep.errors import ConfigError
from everstep.trainer.distributed import sync_batchnorm
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.sharding import (
    check_shardable,
    describe_units,
    find_units,
    materialise,
    parameters_on_meta,
    put_back_tags,
    shard,
    shardable_units,
    tags_of,
    whole_parameters,
)
from everstep.trainer.optim import local
from everstep.trainer.random_state import generators_preserved, seed_generators

COMPUTE = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: None, Dtype.fp64: None}
"""Type that a precision computes in; None is the type of the weights."""


def batch_dtype(precision: PrecisionConfig) -> torch.dtype | None:
    """Return the type that the floats of a batch are cast to; None leaves them as they are."""
    return torch.float64 if precision.dtype is Dtype.fp64 else None


def is_sharded(mesh: Mesh, parallel: ParallelConfig) -> bool:
    return parallel.kind in (ParallelKind.fsdp, ParallelKind.hsdp) and mesh.grid is not None


def second_copy(
    build: Callable[[], nn.Module],
    live: nn.Module,
    mesh: Mesh,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    seed: int,
) -> nn.Module:
    """Return a second model to read a checkpoint into: sharded as the run's, or whole and on the CPU.

    Args:
        live: the model that trains. If the factory returns modules or tensors of it again, the second model is a deep
        copy,
            since a checkpoint read into the former would change the live model.
    """
    with generators_preserved():
        if is_sharded(mesh, parallel):
            model, device = sharded_on_meta(build, mesh, parallel, precision, seed)[0], mesh.device
        else:
            model, device = apart(_on_meta(build, precision, parallel, seed), [live]), torch.device("cpu")
        materialise(model, device)
    return model


def _on_meta(
    build: Callable[[], nn.Module], precision: PrecisionConfig, parallel: ParallelConfig, seed: int
) -> nn.Module:
    """Build the model with parameters on the meta device; with values, if its factory reads them."""
    try:
        with parameters_on_meta():
            return seeded_model(build, seed, precision, parallel)
    except Exception:  # a mistake of the factory is raised by the second call
        return seeded_model(build, seed, precision, parallel)


def apart(model: nn.Module, others: Iterable[nn.Module]) -> nn.Module:
    """Return the model, or a copy of it if it shares modules or memory with one of the others."""
    if any(shares_modules(model, other) or _shares_memory(model, other) for other in others):
        return copy.deepcopy(model)
    return model


def shares_modules(one: nn.Module, other: nn.Module) -> bool:
    return bool({id(module) for module in one.modules()} & {id(module) for module in other.modules()})


def _shares_memory(one: nn.Module, other: nn.Module) -> bool:
    """True if the two models share memory of a parameter or buffer."""
    return bool(_addresses(one) & _addresses(other))


def _addresses(model: nn.Module) -> set[int]:
    tensors = [local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta and tensor.numel()}


def sharded_on_meta(
    build: Callable[[], nn.Module], mesh: Mesh, parallel: ParallelConfig, precision: PrecisionConfig, seed: int
) -> tuple[nn.Module, str]:
    """Return the model with this rank's shards of its parameters, and a line about its units.

    The shards have no memory, unless the factory reads its weights: then each process makes all of them.
    """
    model = _on_meta(build, precision, parallel, seed)
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(mesh.device)
    check_shardable(model, parallel.kind.value)
    prepare_units(model, parallel)
    line = describe_units(model, shardable_units(model, find_units(model, parallel.wrap)))
    tags = tags_of(model)
    shard(model, mesh, parallel, COMPUTE[precision.dtype], lambda unit: compile_module(unit, parallel))
    put_back_tags(model, tags)
    if whole := whole_parameters(model):
        line += f"; {len(whole)} parameters stay whole on each process"
    return model, line


def seeded_model(
    build: Callable[[], nn.Module], seed: int, precision: PrecisionConfig, parallel: ParallelConfig
) -> nn.Module:
    """Build the model with weights that follow from `seed` alone, in the precision of the run."""
    seed_generators(seed)
    model = build()
    if parallel.sync_batchnorm:
        model = sync_batchnorm.convert(model)
    elif not torch.cuda.is_available():
        model = sync_batchnorm.convert_torchs(model)
    return model.double() if precision.dtype is Dtype.fp64 else model


def prepare_units(model: nn.Module, parallel: ParallelConfig) -> str:
    """Apply activation checkpointing to every n-th unit; return a line about the units."""
    every, units = parallel.checkpoint_blocks, find_units(model, parallel.wrap)
    if every and not units:
        raise ConfigError(
            f"parallel.checkpoint_blocks={every}: the model has no repeated blocks that can be found; name its units "
            "by parallel.wrap=[ClassName], or set it to 0"
        )
    outer = [u for path, u in units.items() if not any(path.startswith(f"{other}.") for other in units)]
    for number, unit in enumerate(outer):
        if every and number % every == 0:
            # Replaces a wrapper module, which would change the names of the parameters.
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
    return describe_units(model, units)


def compile_module(model: nn.Module, parallel: ParallelConfig) -> None:
    """Compile the module in place, if `parallel.compile` names a backend."""
    if parallel.compile is not None:
        known = [*torch.compiler.list_backends(), "eager", "aot_eager"]
        if parallel.compile not in known:
            raise ConfigError(f"parallel.compile={parallel.compile!r}: there is no such backend ({', '.join(known)})")
        model.compile(backend=parallel.compile)

"""FSDP2 for models of any kind: units, tied weights, scalars, mixed types, attributes of parameters.

A sharded model is made without memory for its parameters. Parameters that `fully_shard` cannot shard (scalars, complex
numbers, a second type within a unit) stay whole on every rank; their gradients are reduced beside those of the shards.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakTensorKeyDictionary

from everstep.config import ParallelConfig
from everstep.errors import ConfigError, nearest
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.optim import local

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_units(model: nn.Module, wrap: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return the units by path: those that match `parallel.wrap`, else the model's repeated blocks.

    Repeated blocks are the children of a ModuleList, Sequential or ModuleDict of which two or more are of one class and
    have modules of their own: `blocks`, `encoder.layer`, `h`, `layer1`.
    """
    if wrap:
        return _named(model, wrap)
    found: dict[str, nn.Module] = {}
    _find_repeated("", model, found)
    counts: dict[int, int] = defaultdict(int)
    for _, module in model.named_modules(remove_duplicate=False):
        counts[id(module)] += 1
    # A module with several paths (a shared layer) is called several times per pass: it stays with the rest.
    return {path: unit for path, unit in found.items() if counts[id(unit)] == 1}


def shardable_units(model: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the units without those that share a parameter with the rest of the model (tied weights).

    FSDP assigns each parameter to one unit; a parameter of two units must belong to the unit around both.
    """
    owners: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].add(_unit_of(name, units))
    tied = {path for paths in owners.values() if len(paths) > 1 for path in paths}
    return {path: unit for path, unit in units.items() if path not in tied}


def describe_units(model: nn.Module, units: Mapping[str, nn.Module]) -> str:
    """Return a line for the user: the number of units of each class, and the first one's path."""
    if not units:
        return f"1 unit (all of {type(model).__name__}; name its blocks by parallel.wrap)"
    kinds: dict[str, list[str]] = defaultdict(list)
    for path, unit in units.items():
        kinds[type(unit).__name__].append(path)
    shown = ", ".join(f"{len(paths)} × {kind} ({paths[0]}{' …' if paths[1:] else ''})" for kind, paths in kinds.items())
    return f"{shown} and the rest"


def _named(model: nn.Module, wrap: Sequence[str]) -> dict[str, nn.Module]:
    found = {
        path: module
        for path, module in model.named_modules()
        if path and any(_matches(pattern, path, module) for pattern in wrap)
    }
    for pattern in wrap:
        if not any(_matches(pattern, path, module) for path, module in found.items()):
            classes = sorted({type(module).__name__ for module in model.modules()})
            raise ConfigError(
                f"parallel.wrap: {pattern!r} names no class and no module of the model; its classes are "
                f"{', '.join(classes[:20])}{nearest(pattern, classes)}"
            )
    return found


def _matches(pattern: str, path: str, module: nn.Module) -> bool:
    kind = type(module)
    return pattern in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}") or fnmatchcase(path, pattern)


def _find_repeated(path: str, module: nn.Module, found: dict[str, nn.Module]) -> None:
    children = dict(module.named_children())
    if isinstance(module, CONTAINERS):
        kinds = [type(child) for child in children.values() if _is_block(child)]
        repeated = {kind for kind in kinds if kinds.count(kind) > 1}
        blocks = {name: child for name, child in children.items() if type(child) in repeated and _is_block(child)}
    else:
        blocks = {}
    for name, child in children.items():
        inner = f"{path}.{name}" if path else name
        if name in blocks:
            found[inner] = child
        else:
            _find_repeated(inner, child, found)


def _is_block(module: nn.Module) -> bool:
    has_modules = any(True for _ in module.children()) and not isinstance(module, CONTAINERS)
    return has_modules and any(True for _ in module.parameters())


def _unit_of(name: str, units: Mapping[str, nn.Module]) -> str:
    """Return the path of the innermost unit that holds a parameter; an empty string for none."""
    parts = name.split(".")
    return next((path for cut in range(len(parts), 0, -1) if (path := ".".join(parts[:cut])) in units), "")


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Make modules whose parameters have shape and type but no memory; buffers get their values.

    A parameter that is registered twice becomes one parameter again, with the attributes that it had.
    """
    original = nn.Module.register_parameter
    made: Any = WeakTensorKeyDictionary()

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and not isinstance(param, UninitializedParameter):
            if param not in made:
                made[param] = _on_meta(param)
            param = made[param]
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            # A factory that loads weights into them has no effect at this point; rank 0 makes the weights afterwards.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    empty = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
    empty.__class__ = type(parameter)
    vars(empty).update(vars(parameter))
    return empty


def shard(
    model: nn.Module,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: torch.dtype | None,
    compile_unit: Callable[[nn.Module], None],
) -> None:
    """Shard a model unit by unit; `whole_parameters` returns those that stay whole.

    Args:
        dtype: type that the units compute in; None is the type of their parameters.
        compile_unit: called with each unit before it is sharded.
    """
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    # The model's output is in full precision, since losses are summed from it.
    outer = MixedPrecisionPolicy(inner.param_dtype, inner.reduce_dtype, None if dtype is None else torch.float32)
    units = shardable_units(model, find_units(model, parallel.wrap))
    # Innermost first, as fully_shard requires.
    for _, unit in sorted(units.items(), key=lambda item: -item[0].count(".")):
        compile_unit(unit)
        _fully_shard(unit, mesh, inner)
    if not units:
        compile_unit(model)
    _fully_shard(model, mesh, outer)


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a sharded model that each rank holds whole."""
    return [p for p in model.parameters() if not isinstance(p, DTensor)]


def _fully_shard(unit: nn.Module, mesh: Mesh, policy: MixedPrecisionPolicy) -> None:
    parameters = [p for p in unit.parameters() if not isinstance(p, DTensor)]
    whole = _not_shardable(parameters)
    with torch.no_grad():
        for parameter in parameters:
            if parameter not in whole and not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
    fully_shard(unit, mesh=mesh.grid, mp_policy=policy, ignored_params=whole)


def _not_shardable(parameters: list[nn.Parameter]) -> set[nn.Parameter]:
    """Return the scalars, complex and whole numbers, and all parameters not of the unit's main type."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for parameter in parameters:
        if parameter.dim() > 0 and parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    return {p for p in parameters if p.dim() == 0 or p.dtype != most}


def check_shardable(model: nn.Module, kind: str) -> None:
    """Raise ConfigError for a model without parameters, or with sparse gradients."""
    if not any(True for _ in model.parameters()):
        raise ConfigError(f"parallel={kind}: the model has no parameters to shard; use parallel=ddp")
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ConfigError(
                f"parallel={kind}: {path} has sparse=True, and shards have no sparse gradients; "
                "use parallel=ddp, or sparse=False"
            )


def tags_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes that the user has set on parameters, by the parameters' names."""
    return {name: dict(vars(p)) for name, p in model.named_parameters() if vars(p)}


def put_back_tags(model: nn.Module, tags: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the attributes that `tags_of` returned on parameters that lack them."""
    named = dict(model.named_parameters())
    for name, attributes in tags.items():
        for key, value in attributes.items():
            if name in named and not hasattr(named[name], key):
                setattr(named[name], key, value)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device memory.

    Parameters keep the user's attributes, buffers keep their values, and tied weights stay tied.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    tags = tags_of(model)
    kept = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    tied = _tied(model)
    model.to_empty(device=device)
    for (first, leaf), others in tied:
        for module, name in others:
            module._parameters[name] = first._parameters[leaf]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])
    put_back_tags(model, tags)


Place = tuple[nn.Module, str]
"""A module, and the name of a parameter in it."""


def _tied(model: nn.Module) -> list[tuple[Place, list[Place]]]:
    """Return (the first place, the others) of each parameter that modules share."""
    places: dict[int, list[Place]] = defaultdict(list)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places[id(parameter)].append((module, leaf))
    return [(found[0], found[1:]) for found in places.values() if len(found) > 1]


def hand_out(whole: nn.Module | None, model: nn.Module, mesh: Mesh) -> None:
    """Send every rank its shard of the weights that rank 0 has made, one parameter at a time.

    Args:
        whole: the model with its weights, on rank 0 alone.
    """
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

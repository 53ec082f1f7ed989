"""Units of a model, which FSDP shards and activation checkpointing recomputes one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from everstep.errors import ConfigError, nearest

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

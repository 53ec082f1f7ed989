"""Generators that belong to a dataset or a transform, in any of its objects."""

from __future__ import annotations

import functools
import inspect
import logging
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState

from everstep.errors import DataError

LOG = logging.getLogger("everstep")
Generator = torch.Generator | np.random.Generator | RandomState | random.Random
LONGEST = 256
"""Longest list or dict that is searched.

Transforms are in short ones, samples and file names in long ones.
"""
MOST = 5000
"""Objects that are searched in each part; a dataset is searched before each microbatch."""
_LEAVES = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    type(None),
    torch.Tensor,
    np.ndarray,
    np.generic,
    types.ModuleType,
    types.BuiltinFunctionType,
)
_SEVERAL = (list, tuple, set, frozenset, deque)
_CONTAINERS = (dict, *_SEVERAL)
_PLAIN = ("types", "argparse")
_WRAPPERS = ("everstep", "torch")
_NOT_OWN = (*_WRAPPERS, "numpy")
_INSTALLED = ("site-packages", "dist-packages")


def own_generators(*parts: object, most: int = MOST) -> list[Generator]:
    """Return every generator that can be reached from the parts, in an order set by their structure.

    The search follows attributes, short containers, closures and partials; in the user's own code also class attributes
    and the globals that its functions name.

    Args:
        most: objects of each part that are searched; the log names a part that has more.

    Raises:
        DataError: one of them cannot be seeded.
    """
    packages = {_package(part) for part in parts}
    found: list[Generator] = []
    seen: dict[int, object] = {}  # keeps objects alive, so that no id is used twice
    for part in parts:
        _search(part, packages, found, seen, len(seen) + most)
    return found


def _search(root: object, packages: set[str], found: list[Generator], seen: dict[int, object], most: int) -> None:
    """Add generators that can be reached from `root` to `found`, and searched objects to `seen`."""
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if isinstance(part, _LEAVES) or id(part) in seen or (isinstance(part, _CONTAINERS) and not part):
            continue
        if len(seen) >= most:
            _log_limit(type(root).__qualname__)
            return
        seen[id(part)] = part
        if isinstance(part, random.SystemRandom):
            raise DataError(
                "the dataset, model or task has a random.SystemRandom, which nothing can seed: use random.Random"
            )
        if isinstance(part, Generator):
            found.append(part)
        else:
            held = [*_held(part, packages)]
            if _package(part) in _WRAPPERS:
                packages |= {_package(value) for value in held}
            waiting.extend(reversed(held))


@functools.cache
def _log_limit(kind: str) -> None:
    LOG.warning(
        "%s holds so many objects that not all were searched for generators; one that was not found is not seeded: "
        "draw from the global generators instead",
        kind,
    )


def _held(part: Any, packages: Set[str]) -> Iterator[object]:
    """Yield the objects that one object holds, or that the code of a function names."""
    if isinstance(part, functools.partial):
        yield from (part.func, part.args, part.keywords)
    elif isinstance(part, types.MethodType):
        yield from (part.__self__, part.__func__)
    elif isinstance(part, types.FunctionType):
        yield from _of_function(part, packages)
    elif isinstance(part, type):
        yield from _of_class(part, packages)
    else:
        yield from _of_instance(part)


def _of_instance(part: Any) -> Iterator[object]:
    if isinstance(part, _CONTAINERS) and len(part) <= LONGEST:
        yield from part.values() if isinstance(part, dict) else part
    if _is_opaque(type(part).__module__):
        return
    yield type(part)
    yield from getattr(part, "__dict__", {}).values()
    for kind in type(part).__mro__:
        for name in _slots(kind):
            yield getattr(part, name, None)


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if inspect.isdatadescriptor(vars(kind).get(name)))


def _of_class(kind: type, packages: Set[str]) -> Iterator[object]:
    for base in kind.__mro__:
        if _is_own(base.__module__, packages):
            for name, value in tuple(vars(base).items()):
                if isinstance(value, property):
                    yield value.fget
                elif isinstance(value, staticmethod | classmethod):
                    yield value.__func__
                elif name != "__init__" and (isinstance(value, types.FunctionType) or not name.startswith("__")):
                    yield value


def _of_function(function: types.FunctionType, packages: Set[str]) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield function.__dict__.get("__wrapped__")
    if _is_own(function.__module__, packages):
        names = function.__globals__
        yield from (names[name] for name in _names(function.__code__) if name in names)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the globals that the code, or a function inside it, may name."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _package(part: Any) -> str:
    """Return the package that an object's code is in; for a partial, that of its function."""
    while isinstance(part, functools.partial):
        part = part.func
    module = getattr(part, "__module__", None) or type(part).__module__
    return str(module).partition(".")[0]


def _is_own(module: str | None, packages: Set[str]) -> bool:
    package = (module or "builtins").partition(".")[0]
    if package in _NOT_OWN or package in sys.stdlib_module_names:
        return False
    return package in packages or _is_local(package)


@functools.lru_cache(maxsize=4096)
def _is_opaque(module: str) -> bool:
    """True for classes of Python's own, such as loggers and locks, except those that only hold attributes."""
    package = module.partition(".")[0]
    return package in sys.stdlib_module_names and package not in _PLAIN


@functools.lru_cache(maxsize=4096)
def _is_local(package: str) -> bool:
    """True for code that was not installed as a library."""
    path = str(getattr(sys.modules.get(package), "__file__", None) or "")
    return not any(name in path.split("/") for name in _INSTALLED)

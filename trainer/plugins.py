"""Instantiation of `_target_` nodes, limited to the objects that a run may name.

A run folder from another user must not be able to run code, so a target must be in one of a few packages, or in one
that the user named in `plugins`; names that those packages merely import (`torch.nn.os.system`) do not count.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from everstep.config import meant
from everstep.errors import ConfigError, EverstepError, nearest
from everstep.import_path import import_from_here

PUBLIC = ("everstep.tasks", "everstep.models", "everstep.optimizers", "everstep.data", "everstep.sinks")
"""Modules of everstep whose public names (`__all__`) a config may name."""
ALLOWED = (*(f"{module}." for module in PUBLIC), "torch.nn.", "torch.optim.")
"""Prefixes of allowed targets.

Not `torch.utils.data.`: one of its functions unpickles the bytes that it is given, and YAML can hold bytes.
"""
FUNCTIONS = (
    *(
        f"torch.nn.functional.{name}"
        for name in (
            "celu",
            "elu",
            "gelu",
            "glu",
            "hardsigmoid",
            "hardswish",
            "hardtanh",
            "leaky_relu",
            "log_softmax",
            "logsigmoid",
            "mish",
            "normalize",
            "relu",
            "relu6",
            "selu",
            "sigmoid",
            "silu",
            "softmax",
            "softplus",
            "softsign",
            "tanh",
            "binary_cross_entropy_with_logits",
            "cosine_similarity",
            "cross_entropy",
            "huber_loss",
            "kl_div",
            "l1_loss",
            "mse_loss",
            "nll_loss",
            "poisson_nll_loss",
            "smooth_l1_loss",
            "triplet_margin_loss",
        )
    ),
    *(f"torch.nn.utils.parametrizations.{name}" for name in ("orthogonal", "spectral_norm", "weight_norm")),
)
"""Functions of torch that a config may name; of its classes all modules, optimizers and schedulers.

Others reach further than they look: torch.nn.Module.compile takes the path of a compiler.
"""
BASES = ("torch.nn.modules.module.Module", "torch.optim.optimizer.Optimizer", "torch.optim.lr_scheduler.LRScheduler")
TARGET = "_target_"
PARTIAL = "_partial_"


def is_node(value: object) -> bool:
    return isinstance(value, Mapping) and TARGET in value


def check_allowed(node: object, key: str, plugins: Iterable[str]) -> None:
    """Raise ConfigError for any target below `node` outside the allowed packages; imports nothing."""
    if isinstance(node, Mapping):
        if TARGET in node:
            _check_name(node[TARGET], key, plugins)
        for name, value in node.items():
            check_allowed(value, f"{key}.{name}", plugins)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            check_allowed(value, f"{key}[{number}]", plugins)


def instantiate(node: Any, key: str, plugins: Iterable[str], **runtime: Any) -> Any:
    """Return the object that a node describes, its inner nodes first.

    Args:
        key: path of the node in the config, for error messages.
        plugins: packages of the user that targets may be in.
        runtime: objects that only exist at run time; passed if the constructor has a parameter of that name.

    Raises:
        ConfigError: the target is not allowed, does not exist, or does not accept the arguments.
    """
    return prepare(node, key, plugins, **runtime)()


def prepare(node: Any, key: str, plugins: Iterable[str], **runtime: Any) -> Callable[[], Any]:
    """Return a function that makes the object of a node, whose target and arguments are checked."""
    if not is_node(node):
        raise ConfigError(f"{key} has no {TARGET}: it must name a class or function")
    target = _resolve(node[TARGET], key, plugins)
    arguments = {
        name: _value(value, f"{key}.{name}", plugins) for name, value in node.items() if name not in (TARGET, PARTIAL)
    }
    arguments |= _fitting(target, runtime)
    partial = bool(node.get(PARTIAL))
    _check_arguments(target, node[TARGET], key, arguments, partial)

    def make() -> Any:
        if partial:
            return functools.partial(target, **arguments)
        try:
            return target(**arguments)
        except EverstepError:
            raise
        except (TypeError, ValueError, AssertionError, FileNotFoundError) as error:
            raise ConfigError(f"{key} ({node[TARGET]}): {' '.join(str(error).split())}") from error

    return make


def _value(value: Any, key: str, plugins: Iterable[str]) -> Any:
    if is_node(value):
        return instantiate(value, key, plugins)
    if isinstance(value, Mapping):
        return {name: _value(item, f"{key}.{name}", plugins) for name, item in value.items()}
    if isinstance(value, list):
        return [_value(item, f"{key}[{number}]", plugins) for number, item in enumerate(value)]
    return value


def _check_name(target: object, key: str, plugins: Iterable[str]) -> None:
    allowed = (*ALLOWED, *(f"{name}." for name in plugins))
    if not isinstance(target, str) or not target.startswith(allowed):
        package = str(target).split(".")[0]
        fix = "choose a public name" if package == "everstep" else f"name your package with 'plugins=[{package}]'"
        raise ConfigError(
            f"{key}._target_={target!r} is in none of the packages that this run may use "
            f"({', '.join(a[:-1] for a in allowed)}); {fix}"
        )
    if "._" in target and not target.startswith(allowed[len(ALLOWED) :]):
        # Some of torch's private functions import any module by name.
        raise ConfigError(f"{key}._target_={target!r} is a private name; name a public one")


def _resolve(target: str, key: str, plugins: Iterable[str]) -> Any:
    _check_name(target, key, plugins)
    if target.startswith(tuple(f"{name}." for name in plugins)):
        import_from_here()
    found = _import(target, key)
    if target in FUNCTIONS or _is_public(target):
        return found
    home = f"{getattr(found, '__module__', '')}."
    if callable(found) and home.startswith(tuple(f"{name}." for name in plugins)):
        return found
    if not callable(found) or not home.startswith(ALLOWED):
        raise ConfigError(f"{key}._target_={target!r} is not a class or function that its package defines")
    if not (_is_part(found) or f"{home}{getattr(found, '__qualname__', '')}" in FUNCTIONS):
        # Through a plugin too (`mine.nn.Module.compile`): a name that it imports is not its own code.
        raise ConfigError(
            f"{key}._target_={target!r} is no module, optimizer or scheduler of torch; "
            "name a class of torch.nn or torch.optim, or a function of your own package"
        )
    return found


def _is_part(found: object) -> bool:
    """True for a module, optimizer or scheduler of torch; torch itself is not imported here."""
    return isinstance(found, type) and any(f"{base.__module__}.{base.__qualname__}" in BASES for base in found.__mro__)


def _is_public(target: str) -> bool:
    module, _, name = target.rpartition(".")
    return module in PUBLIC and name in importlib.import_module(module).__all__


def _import(target: str, key: str) -> Any:
    """Import the longest module that the dotted name begins with, then follow the attributes."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                continue
            raise ConfigError(f"{key}._target_={target!r}: cannot import {name}: {error}") from error
        for part in parts[cut:]:
            if not hasattr(found, part):
                hint = nearest(part, getattr(found, "__all__", [n for n in dir(found) if n[0] != "_"]))
                raise ConfigError(f"{key}._target_={target!r}: {name} has no {part!r}{hint}")
            found = getattr(found, part)
        return found
    raise ConfigError(f"{key}._target_={target!r}: there is no module {parts[0]!r}; is your package installed?")


def _fitting(target: Any, runtime: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(target)
    return {name: value for name, value in runtime.items() if name in parameters}


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters; for a function in C, which has no signature, any may be given."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}


def _check_arguments(target: Any, name: str, key: str, arguments: Mapping[str, Any], partial: bool) -> None:
    parameters = _parameters(target)
    kinds = inspect.Parameter
    named = {p.name for p in parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    if not any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
        for argument in arguments:
            if argument not in named:
                raise ConfigError(f"{key}.{argument}: {name} takes no {argument!r}{meant(argument, named)}")
    missing = [p for p in named - arguments.keys() if parameters[p].default is kinds.empty]
    if missing and not partial:
        itself = ", or _partial_: true if the function itself is the hook" if key.startswith("hooks[") else ""
        raise ConfigError(f"{key}: {name} needs {', '.join(sorted(missing))}; set {key}.{sorted(missing)[0]}{itself}")

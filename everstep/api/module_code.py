"""Python expression that makes a torch module again, and a check that it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from everstep.api.constructor import arguments_of, check_made_again
from everstep.errors import ConfigError

CHILDREN = (nn.Sequential, nn.ModuleList)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FUNCTION = "give a function without arguments that makes the model"


def module_code(module: nn.Module, add: Callable[[type], None]) -> str:
    """Return an expression for a module of the same structure; its weights are new ones.

    Args:
        add: called with each class that is not torch's.

    Raises:
        ConfigError: no expression gives the same structure.
    """
    code, again = _rebuilt(module, add)
    for name, part in module.named_modules():
        if any(getattr(part, hooks) for hooks in HOOKS) or "forward" in vars(part):
            raise ConfigError(f"model: {name or type(module).__name__} has hooks or a forward of its own; {FUNCTION}")
    for (name, part), other in zip(module.named_modules(), again.modules(), strict=False):
        check_made_again(part, other, f"model.{name}".rstrip("."))
    if _structure(module) != _structure(again):
        raise ConfigError(f"model: this {type(module).__name__} cannot be written to the run as it is; {FUNCTION}")
    return code


def _rebuilt(module: nn.Module, add: Callable[[type], None]) -> tuple[str, nn.Module]:
    kind = type(module)
    if kind in CHILDREN:
        children = dict(module.named_children())
        made = {name: _rebuilt(child, add) for name, child in children.items()}
        if list(children) == [str(number) for number in range(len(children))]:
            inner = ", ".join(code for code, _ in made.values())
            parts = [part for _, part in made.values()]
            if kind is nn.ModuleList:
                return f"torch.nn.ModuleList([{inner}])", nn.ModuleList(parts)
            return f"torch.nn.Sequential({inner})", nn.Sequential(*parts)
        inner = ", ".join(f"{name!r}: {code}" for name, (code, _) in made.items())
        named = {name: part for name, (_, part) in made.items()}
        return f"torch.nn.Sequential(collections.OrderedDict({{{inner}}}))", nn.Sequential(_ordered(named))
    is_torchs = getattr(nn, kind.__name__, None) is kind
    if not is_torchs:
        add(kind)
    given = arguments_of(module, "model", defaults_count=is_torchs)
    words = ", ".join(f"{name}={value!r}" for name, value in given.items())
    with torch.random.fork_rng(devices=[]):  # a notebook's generator goes on as if nothing had been made
        return f"{'torch.nn.' if is_torchs else ''}{kind.__name__}({words})", kind(**given)


def _ordered(parts: dict[str, nn.Module]) -> Any:
    from collections import OrderedDict

    return OrderedDict(parts)


def _structure(module: nn.Module) -> tuple[object, ...]:
    """Return all that a module's text and tensors say of it, but the tensors' values."""
    tensors = [(name, tuple(value.shape), value.dtype) for name, value in module.state_dict().items()]
    trained = [(name, parameter.requires_grad) for name, parameter in module.named_parameters()]
    return repr(module), tensors, trained

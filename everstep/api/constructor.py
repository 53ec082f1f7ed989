"""Arguments with which an object was made, read from its attributes, so that a file can make it again."""

from __future__ import annotations

import inspect
from typing import Any

from everstep.errors import ConfigError

PLAIN = (bool, int, float, str, type(None))
MODES = {"training"}
"""Attributes that a run sets itself."""
SHOWN = 60
"""Characters of a value in a message."""
PLACEMENT = ("device", "dtype")
"""Parameters of torch's modules that say where the first weights are; a run decides that itself."""


def is_plain(value: object) -> bool:
    """True if `repr` of the value gives it back: numbers, texts, and lists, tuples and dicts of them."""
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return type(value) in PLAIN


def arguments_of(thing: object, name: str, defaults_count: bool = False) -> dict[str, Any]:
    """Return the arguments of the constructor: the attributes of the same names, also with `_` before.

    Args:
        name: the object in messages.
        defaults_count: a parameter without such an attribute has its default.

    Raises:
        ConfigError: an argument cannot be known, or cannot be written to a file.
    """
    kind, found = type(thing), {}
    if kind.__init__ is object.__init__:
        return {}
    for parameter in inspect.signature(kind).parameters.values():
        value = _attribute(thing, parameter)
        if value is inspect.Parameter.empty:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and defaults_count:
                continue
            if not defaults_count or parameter.default is parameter.empty:
                raise ConfigError(
                    f"{name}: {kind.__name__} does not keep its argument {parameter.name!r} as an attribute, so its "
                    f"value cannot be written to the run; set self.{parameter.name} = {parameter.name} in __init__, or "
                    f"give a function without arguments that makes the {name}"
                )
        elif not is_plain(value):
            raise ConfigError(
                f"{name}: {kind.__name__}.{parameter.name} is a {type(value).__name__}, which cannot be written to the "
                f"run (numbers, texts, lists and dicts can); give a function without arguments that makes the {name}"
            )
        elif parameter.default is parameter.empty or value != parameter.default:
            found[parameter.name] = value
    return found


def check_made_again(thing: object, again: object, name: str) -> None:
    """Raise ConfigError if an object that was made again from its arguments has other plain attributes."""
    before, after = vars(thing), vars(again)
    for key in sorted((before.keys() | after.keys()) - MODES):
        one, other = before.get(key), after.get(key)
        if type(one) is not type(other) or (is_plain(one) and one != other):
            raise ConfigError(
                f"{name}: {type(thing).__name__}.{key} is {_short(one)}, and {_short(other)} in one that is made from "
                f"the same arguments, as the run would; give a function without arguments that makes the {name}"
            )


def _short(value: object) -> str:
    return repr(value)[:SHOWN] if is_plain(value) else f"a {type(value).__name__}"


def _attribute(thing: object, parameter: inspect.Parameter) -> Any:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in PLACEMENT:
        return parameter.empty if parameter.name not in PLACEMENT else parameter.default
    for name in (parameter.name, f"_{parameter.name}"):
        if hasattr(thing, name):
            value = getattr(thing, name)
            # torch's layers take `bias: bool` and keep the parameter, or None
            return value is not None if isinstance(parameter.default, bool) and not is_plain(value) else value
    return parameter.empty

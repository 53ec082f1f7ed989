"""Source text of what a notebook or script defines, with all that it uses, as a module."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import linecache
import sys
import types
from collections.abc import Iterator
from typing import Any

from everstep.api.constructor import is_plain
from everstep.errors import ConfigError

MAIN = "__main__"


class CellSource:
    """Collects definitions of `__main__` in the order in which they need each other."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        """Definition or import by the name that it defines."""

    def add(self, thing: Any, name: str) -> None:
        """Add a class or function of `__main__`, and first what it uses.

        Args:
            name: its role in messages, such as "task".

        Raises:
            ConfigError: its source cannot be found, or it uses an object that cannot be written to a file.
        """
        if thing.__name__ == "<lambda>":
            raise ConfigError(f"{name} is a lambda, whose source has no name; define it with def")
        if thing.__name__ not in self._texts:
            self._texts[thing.__name__] = ""  # a function that calls itself is not followed again
            _refuse_closure(thing, name)
            text, tree = source_of(thing, name)
            for used in _free_names(tree):
                self._add_name(used, thing, name)
            del self._texts[thing.__name__]
            self._texts[thing.__name__] = text

    def add_import(self, thing: Any) -> None:
        """Add the import of a class or function of another module."""
        if (line := _import_of(thing.__name__, thing)) is None:
            raise ConfigError(
                f"{thing.__qualname__} cannot be imported from {thing.__module__}; define it at top level"
            )
        self._texts[thing.__name__] = line

    def text(self) -> str:
        """Return the module's text: imports, then definitions."""
        imports = [text for text in self._texts.values() if text.startswith(("import ", "from "))]
        others = [text for text in self._texts.values() if not text.startswith(("import ", "from "))]
        return "\n".join(imports) + "\n\n\n" + "\n\n\n".join(others) + "\n"

    def _add_name(self, used: str, user: Any, name: str) -> None:
        scope = vars(sys.modules[MAIN])
        if used in self._texts or used not in scope:
            return  # a builtin, or a name that exists when it is called, if ever
        value = scope[used]
        if getattr(value, "__module__", None) == MAIN and isinstance(value, type | types.FunctionType):
            self.add(value, name)
            if value.__name__ != used:
                self._texts[used] = f"{used} = {value.__name__}"
        elif (line := _import_of(used, value)) is not None:
            self._texts[used] = line
        elif is_plain(value):
            self._texts[used] = f"{used} = {value!r}"
        else:
            raise ConfigError(
                f"{name}: {user.__name__} uses {used}, a {type(value).__name__} of this notebook or script, which "
                "cannot be written to the run; pass it as data, or make it inside the class or function"
            )


def _refuse_closure(thing: Any, name: str) -> None:
    """Raise ConfigError for a definition that uses variables of the function around it."""
    held = [variable for code in _codes(thing) for variable in code.co_freevars if variable != "__class__"]
    if held:
        raise ConfigError(
            f"{name}: {thing.__name__} uses {held[0]} of the function around it, which cannot be written to the run; "
            "define both at top level, or pass it to the constructor"
        )


def source_of(thing: Any, name: str) -> tuple[str, ast.AST]:
    """Return the text of a definition and its syntax tree.

    Raises:
        ConfigError: there is no source, as in a plain `python` prompt.
    """
    for code in _codes(thing):
        lines = linecache.getlines(code.co_filename)
        try:
            tree = ast.parse("".join(lines))
        except SyntaxError:  # a cell with %magic lines
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name != thing.__name__:
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= code.co_firstlineno <= (node.end_lineno or 0):
                text = "".join(lines[first - 1 : node.end_lineno]).rstrip()
                # Taking the indentation away would change texts of several lines within.
                return f"if True:\n{text}" if text[:1].isspace() else text, node
    raise ConfigError(
        f"{name}: the source of {thing.__name__} cannot be found, so it cannot be written to the run; define it in a "
        "cell without % lines, a script or a module"
    )


def _codes(thing: Any) -> Iterator[types.CodeType]:
    if isinstance(thing, types.FunctionType):
        yield inspect.unwrap(thing).__code__
        return
    for value in vars(thing).values():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, types.FunctionType) and function.__module__ == MAIN:
            yield function.__code__


def _free_names(tree: ast.AST) -> list[str]:
    """Return the names that a definition reads, without builtins; names of its own among them do no harm."""
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    for node in ast.walk(tree):  # annotations in quotes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.append(node.value) if isinstance(vars(sys.modules[MAIN]).get(node.value), type) else None
    return list(dict.fromkeys(name for name in names if not hasattr(builtins, name)))


def _import_of(used: str, value: Any) -> str | None:
    """Return the line that imports a module, or an object that a module other than `__main__` defines."""
    if isinstance(value, types.ModuleType):
        parent, _, last = value.__name__.rpartition(".")
        if value.__name__ == used:
            return f"import {used}"
        return f"from {parent} import {last} as {used}" if parent else f"import {value.__name__} as {used}"
    module, own = getattr(value, "__module__", None), getattr(value, "__name__", None) or used
    if not isinstance(module, str) or module in (MAIN, "builtins") or "." in getattr(value, "__qualname__", own):
        return None
    if getattr(importlib.import_module(module), own, None) is not value:
        return None
    return f"from {module} import {own}" + ("" if own == used else f" as {used}")

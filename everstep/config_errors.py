"""Config errors of Hydra, OmegaConf or YAML, in one line: the problem, its place and the nearest name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from everstep.config import meant
from everstep.errors import nearest

_FILE = re.compile(r"In '([^']*)': (.*)", re.DOTALL)
_NO_KEY = re.compile(r"Key '([^']*)' not in '\w+'")
_NO_GROUP = re.compile(r"merge error: (\w+) is not a subclass of \w+. value: (.*)", re.IGNORECASE)
_NO_OPTION = re.compile(r"Could not find '([^']*)/([^'/]*)'")
_NO_OVERRIDE = re.compile(r"Could not override '([^']*)'")
_TWICE = re.compile(r"Multiple values for ([\w/]+)\.")
PACKAGE = "# @package _global_"


def in_one_line(
    error: BaseException, keys: Sequence[str] = (), groups: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Return the error in one line.

    Args:
        keys: all dotted keys, and `groups` with their options, to suggest the nearest.
    """
    if isinstance(error, yaml.MarkedYAMLError):
        return _of_yaml(error)
    found = _FILE.match(str(error))
    file, said = (found[1], found[2]) if found else ("", str(error))
    lines = [line for line in map(str.strip, said.splitlines()) if line] or [type(error).__name__]
    if len(lines) > 1 and lines[0].endswith("raised while composing config:"):
        del lines[0]
    if error.__cause__ is not None and lines[0].startswith("Error merging override"):
        return f"{lines[0]}: {in_one_line(error.__cause__, keys, groups)}"
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    text = _of_key(lines[0], key, keys) or _of_choice(lines[0], groups or {})
    text = text or (f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0])
    return f"{file}.yaml: {text}" if file not in ("", "run") else text


def of_a_word(word: str, keys: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str:
    """Return a suggestion for an argument that cannot be parsed, or an empty string."""
    if "=" in word and word[-1] in ",;":
        return f"; leave out the {word[-1]!r} at its end"
    if word in keys or word in groups:
        return f"; write {word}=VALUE"
    holders = sorted((group for group, options in groups.items() if word in options), key=lambda g: g != "experiment")
    return f"; did you mean '{holders[0]}={word}'?" if holders else ""


def _of_yaml(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    if mark is None:
        return str(error).splitlines()[0]
    place = f"line {mark.line + 1}" if mark.name.startswith("<") else f"{mark.name}, line {mark.line + 1}"
    return f"{place} is no YAML: {error.problem or error.context}"


def _of_key(message: str, key: str, keys: Sequence[str]) -> str | None:
    if (found := _NO_KEY.match(message)) is not None:
        name = key or found[1]
        if name.split(".")[0] == "experiment":
            return f"its keys would all lie below 'experiment'; make {PACKAGE!r} its first line"
        return f"no key {name!r}{meant(name, keys)}"
    if (found := _NO_GROUP.match(message)) is not None:
        return f"{found[2]} stands in the place of a group of keys; give the keys below it"
    return None


def _of_choice(message: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    """Return the message for the list `defaults` of a file, or for a group on the command line."""
    if (found := _NO_OPTION.match(message)) is not None:
        group, option = found[1], found[2]
        options = groups.get(group)
        if options is None:
            return f"there is no group {group!r}{nearest(group, groups)}; there are {', '.join(groups)}"
        return f"there is no {group} {option!r}{nearest(option, options)}; there are {', '.join(options)}"
    if (found := _NO_OVERRIDE.match(message)) is not None:
        name = found[1].partition("@")[0].rpartition("/")[2]
        if name not in groups:
            return f"there is no group {name!r}{nearest(name, groups)}; there are {', '.join(groups)}"
        if "/" in found[1].partition("@")[0]:
            return f"write '- override /{name}: …' in defaults, with the slash"
        return f"make {PACKAGE!r} its first line"
    if (found := _TWICE.match(message)) is not None:
        return f"{found[1]} is chosen twice; write '- override /{found[1]}: …' in defaults, with the word override"
    return None

"""Map of weight names: `init_map`, patterns of old names and what they become."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from everstep.errors import ConfigError, nearest

LARGEST_FILE = 1 << 24


def read_map(given: object) -> dict[str, str]:
    """Return the map that a config gives, or that is in the YAML file which it names."""
    found = given
    if isinstance(given, str):
        path = Path(given).expanduser()
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ConfigError(f"init_map={given}: it is larger than {LARGEST_FILE} bytes")
            found = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"init_map={given}: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ConfigError("init_map must be a mapping of old to new names; write '{bert.*: encoder.*}'")
    for old, new in found.items():
        if old.count("*") != new.count("*"):
            raise ConfigError(f"init_map: {old!r} and {new!r} have not equally many *; each stands for the same text")
    return dict(found)


def renamed(names: Iterable[str], patterns: Mapping[str, str]) -> dict[str, str]:
    """Return the old name of each new name; the first pattern that matches a name counts.

    Raises:
        ConfigError: a pattern matches nothing, or two names become the same.
    """
    old_names, used = list(names), set()
    result: dict[str, str] = {}
    rules = [(re.compile("(.*)".join(map(re.escape, old.split("*")))), old, new) for old, new in patterns.items()]
    for name in old_names:
        becomes = name
        for rule, old, new in rules:
            if (found := rule.fullmatch(name)) is not None:
                parts = [*found.groups(), ""]
                becomes = "".join(piece + part for piece, part in zip(new.split("*"), parts, strict=True))
                used.add(old)
                break
        if becomes in result:
            raise ConfigError(f"init_map: {result[becomes]} and {name} both become {becomes}; change a pattern")
        result[becomes] = name
    for old in patterns:
        if old not in used:
            raise ConfigError(
                f"init_map: {old!r} matches no name there{nearest(old, old_names)}; there are {_first(old_names)}"
            )
    return result


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""JSON from elsewhere: checks of the type and the range of every field before it is used.

All functions raise ValueError in one line that names the place. Types are compared and not asked for with isinstance,
because in Python True is an int and 1.0 == 1.
"""

from __future__ import annotations

import json
import sys
from typing import Any

LONGEST_TEXT = 255
MOST = (1 << 63) - 1
LATEST = 4e9
"""Limit of a time that can be shown, in seconds since the epoch."""
LARGEST = sys.float_info.max
SHOWN = 40
"""Characters of a wrong value that a message shows."""


def parse(data: bytes | str | memoryview) -> Any:
    """Return the value of a JSON text; nesting that exceeds Python's stack is a ValueError too."""
    try:
        return json.loads(bytes(data) if isinstance(data, memoryview) else data)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def shown(value: object) -> str:
    """Return a value for a message: short, in one line, in ASCII."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def whole(value: object, place: str, low: int = 0, high: int = MOST) -> int:
    """Return a whole number in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{place} is {shown(value)}, not a whole number from {low} to {high}")
    return value


def number(value: object, place: str, low: float = -LARGEST, high: float = LARGEST) -> float:
    """Return a finite number in [low, high]."""
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]  # false for NaN
        raise ValueError(f"{place} is {shown(value)}, not a number from {low:g} to {high:g}")
    return value  # type: ignore[return-value]


def text(value: object, place: str, longest: int = LONGEST_TEXT) -> str:
    """Return a text of at most `longest` characters, which can be encoded as UTF-8."""
    if type(value) is not str or len(value) > longest:
        raise ValueError(f"{place} is {shown(value)}, not a text of at most {longest} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} is {shown(value)}, which is no valid Unicode") from None
    return value


def mapping(value: object, place: str, most: int = MOST) -> dict[str, Any]:
    """Return an object of at most `most` fields."""
    if type(value) is not dict or len(value) > most:
        raise ValueError(f"{place} is {shown(value)}, not an object" + (f" of at most {most}" if most < MOST else ""))
    return value


def record(value: object, place: str, *keys: str) -> list[Any]:
    """Return the values of an object that has exactly these fields, in the order of `keys`."""
    found = mapping(value, place)
    if set(found) != set(keys):
        raise ValueError(f"{place} has the fields {shown(sorted(found))}, not {', '.join(keys)}")
    return [found[key] for key in keys]


def sequence(value: object, place: str, most: int = MOST) -> list[Any]:
    """Return a list of at most `most` items."""
    if type(value) is not list or len(value) > most:
        raise ValueError(f"{place} is {shown(value)}, not a list" + (f" of at most {most}" if most < MOST else ""))
    return value

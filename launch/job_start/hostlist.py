"""Expansion of Slurm's host lists, such as gpu[01-04,07]-ib."""

from __future__ import annotations

import re


def expand(text: str) -> tuple[str, ...]:
    """Return the names in order: `n[1-2],m3` is n1, n2, m3; leading zeros stay."""
    return tuple(name for part in _split(text) for name in _expand_one(part))


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [part for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) if part.strip()]


def _expand_one(part: str) -> list[str]:
    form = re.search(r"\[([^\]]*)\]", part)
    if form is None:
        return [part]
    before, after = part[: form.start()], _expand_one(part[form.end() :])
    return [f"{before}{number}{rest}" for span in form[1].split(",") for number in _numbers(span) for rest in after]


def _numbers(span: str) -> list[str]:
    first, dash, last = span.partition("-")
    if not dash:
        return [first]
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]

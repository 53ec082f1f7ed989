"""Helpers of tests with real processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest


def until(fits: Callable[[], bool], seconds: float = 20.0) -> None:
    """Poll with a deadline."""
    deadline = time.monotonic() + seconds
    while not fits():
        if time.monotonic() > deadline:
            pytest.fail("gave up waiting")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between open and read
        return False


def children(pid: int) -> list[int]:
    return sorted(_families().get(pid, []))


def below(pid: int) -> list[int]:
    families = _families()

    def each(of: int) -> list[int]:
        return [p for child in sorted(families.get(of, [])) for p in (child, *each(child))]

    return each(pid)


def _families() -> dict[int, list[int]]:
    """Parent → children that live."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return found

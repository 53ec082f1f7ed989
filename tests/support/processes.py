"""What tests with real processes share."""

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
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def below(pid: int) -> list[int]:
    return [p for child in children(pid) for p in (child, *below(child))]

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

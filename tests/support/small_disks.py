"""Disks that are soon full: small file systems in memory, which only root may mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk mounted at `place` for as long as the block lasts; args: size: as mount takes it, such as 4m."""
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True, check=False).returncode != 0:
        pytest.skip("a full disk is made by mounting a small one, which this user may not")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)

"""Figures of this node: CPU, memory, disks and network, as the operating system counts them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from everstep.control_group import memory_usage

Figures = dict[str, float | str]
"""Name → measured value, or words. A figure that a machine does not have is left out."""
MIB, MB, GB = 2**20, 1e6, 1e9
LOOPBACK = "lo"


class HostMeter:
    """Reads the counters of the machine; rates are those since the call before."""

    def __init__(self, disks: Mapping[str, Path]) -> None:
        """Take the counts from which the first rates are made.

        Args:
            disks: name → folder on the disk whose free space is of interest.
        """
        self.disks = disks
        psutil.cpu_percent()
        self._counted = _counters()
        self._at = time.monotonic()

    def sample(self) -> Figures:
        now, counted = time.monotonic(), _counters()
        seconds = max(now - self._at, 1e-6)
        figures: Figures = {"cpu_percent": psutil.cpu_percent(), **_memory()}
        for name, count in counted.items():
            if (
                before := self._counted.get(name)
            ) is not None and count >= before:  # counters of a disk that was removed
                figures[name] = round((count - before) / seconds / MB, 3)
        self._counted, self._at = counted, now
        for name, folder in self.disks.items():
            with contextlib.suppress(OSError):
                figures[f"{name}_free_gb"] = round(_free(folder) / GB, 3)
        return figures


def _memory() -> Figures:
    """Return the memory in use, and its limit: that of the control group, else the machine's."""
    whole, group = psutil.virtual_memory(), memory_usage()
    used, limit = whole.total - whole.available, whole.total
    if group is not None and group.limit < whole.total:
        used, limit = group.used, group.limit
    return {"memory_mb": round(used / MIB, 1), "memory_limit_mb": round(limit / MIB, 1)}


def _counters() -> dict[str, int]:
    """Return the bytes that disks and network have moved; empty for what cannot be read."""
    counted: dict[str, int] = {}
    with contextlib.suppress(OSError, RuntimeError, NotImplementedError, ValueError):
        if (disks := psutil.disk_io_counters()) is not None:
            counted |= {"disk_read_mb_s": disks.read_bytes, "disk_write_mb_s": disks.write_bytes}
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        nics = [count for name, count in psutil.net_io_counters(pernic=True).items() if name != LOOPBACK]
        counted["net_in_mb_s"] = sum(count.bytes_recv for count in nics)
        counted["net_out_mb_s"] = sum(count.bytes_sent for count in nics)
    return counted


def _free(folder: Path) -> int:
    """Return the bytes that a user may still write to the disk on which a folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize

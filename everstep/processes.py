"""Processes of this machine, identified by PID and start time, since PIDs are reused."""

from __future__ import annotations

import os
from pathlib import Path

SLACK_S = 2.0
"""Largest error of a start time: /proc counts from a boot time in whole seconds."""


def start_ticks(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def has_run_since(pid: int | None, at: float) -> bool:
    """True if the process that had this PID at the time `at` (seconds since the epoch) is alive."""
    if pid is None:
        return False
    if not Path("/proc/self/stat").exists():
        return _answers(pid)
    ticks = start_ticks(pid)
    return ticks is not None and _booted_at() + ticks / os.sysconf("SC_CLK_TCK") <= at + SLACK_S


def _booted_at() -> float:
    lines = Path("/proc/stat").read_text().splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)


def _answers(pid: int) -> bool:
    """True if a process has the PID; used without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Liveness of an attempt's processes: from the kernel on this machine, from the run folder on others."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from everstep.launch.runs.history import Attempt, History

START_S = 900.0
"""Seconds that an attempt on another machine may take to its first record before it counts as silent."""
PATIENCE_S = 120.0
RECORDS = 5
"""Consecutive records that must be missing before a run on another machine counts as silent."""
SLACK_S = 2.0


def alive(history: History, now: float) -> bool | None:
    """True if the last attempt lives; None if unknown: on another machine, with its records overdue."""
    last = history.last
    if last is None or last.ending is not None:
        return False
    if is_here(last):
        return has_process(last)
    seen = float(history.progress.get("time") or 0.0)
    if seen < last.claimed_at:
        return True if now - last.claimed_at < START_S else None
    usual = float(history.progress.get("next_s") or 0.0)
    return True if now - seen < max(PATIENCE_S, RECORDS * usual) else None


def is_here(attempt: Attempt) -> bool:
    return attempt.host == socket.gethostname()


def has_process(attempt: Attempt) -> bool:
    """True if the process that claimed the attempt is alive. Compares start times: PIDs are reused."""
    try:
        fields = Path(f"/proc/{attempt.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists() and _answers(attempt.pid)
    except (OSError, IndexError):
        return False
    ticks = os.sysconf("SC_CLK_TCK")
    return fields[0] not in "ZX" and _booted_at() + int(fields[19]) / ticks <= attempt.claimed_at + SLACK_S


def _booted_at() -> float:
    lines = Path("/proc/stat").read_text().splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)


def _answers(pid: int | None) -> bool:
    """True if a process has the PID; used without /proc."""
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

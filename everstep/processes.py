"""Processes of this machine, identified by PID and creation time, since PIDs are reused."""

from __future__ import annotations

SLACK_S = 2.0
"""Largest error of a creation time: the kernel counts from a boot time in whole seconds."""


def created_at(pid: int) -> float | None:
    """Return the creation time of a process in seconds since the epoch; None if it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def has_run_since(pid: int | None, at: float) -> bool:
    """True if the process that had this PID at the time `at` (seconds since the epoch) is alive."""
    created = None if pid is None else created_at(pid)
    return created is not None and created <= at + SLACK_S


def command_line(pid: int) -> list[str]:
    """Return the arguments of a process; empty if it has ended or belongs to another user."""
    import psutil

    try:
        return list(psutil.Process(pid).cmdline())
    except psutil.Error:
        return []


def children(pid: int, recursive: bool = False) -> list[int]:
    """Return the running children of a process, or all its descendants; empty if it has ended."""
    import psutil

    found = []
    try:
        for each in psutil.Process(pid).children(recursive):
            try:
                found += [each.pid] * (each.status() != psutil.STATUS_ZOMBIE)
            except psutil.Error:
                continue
    except psutil.Error:
        return []
    return found

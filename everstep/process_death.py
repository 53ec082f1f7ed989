"""Cause of a process's death: the signal, and the kernel's out-of-memory kills."""

from __future__ import annotations

import signal
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


class OutOfMemoryCount:
    """Count of out-of-memory kills in this control group since the object was made."""

    def __init__(self) -> None:
        self._before = _killed()

    def since(self) -> int:
        """Return the number of kills; 0 when unknown."""
        now = _killed()
        return 0 if now is None or self._before is None else max(0, now - self._before)


def _killed() -> int | None:
    for file, key in _counters():
        try:
            words = dict(line.split()[:2] for line in file.read_text().splitlines() if len(line.split()) > 1)
        except OSError:
            continue
        if words.get(key, "").isdigit():
            return int(words[key])
    return None


def _counters() -> list[tuple[Path, str]]:
    """Return files (of control groups v2 and v1) that may hold the count, this process's group first."""
    found: list[tuple[Path, str]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append((CGROUPS / path.lstrip("/") / "memory.events", "oom_kill"))
        elif "memory" in controllers.split(","):
            found.append((CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control", "oom_kill"))
    # In a container the path is often that of the host, and the group is at the root.
    return [*found, (CGROUPS / "memory.events", "oom_kill"), (CGROUPS / "memory/memory.oom_control", "oom_kill")]


def death_of(who: str, number: int, killed_for_memory: int) -> str:
    """Return `rank 1 was killed by SIGKILL`, and that memory may be the cause.

    Args:
        number: of the signal.
        killed_for_memory: kills counted by the control group since the process was started.
    """
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and killed_for_memory:
        return f"{who} was killed by {name} (out of memory: memory.events oom_kill={killed_for_memory})"
    return f"{who} was killed by {name}"

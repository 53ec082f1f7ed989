"""Memory of this process's control group, versions 1 and 2. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""Bytes from which a limit is none: version 1 writes a number near 2⁶³."""


@dataclass(frozen=True)
class Usage:
    """Memory of a group that has a limit, in bytes."""

    used: int
    """Without files of the page cache that the kernel gives back first."""
    limit: int

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


@dataclass(frozen=True)
class MemoryGroup:
    """Folder of one group's memory controller, with the names of its files."""

    folder: Path
    is_v2: bool

    def usage(self) -> Usage | None:
        """Return what is used and the limit; None if it has no limit, or cannot be read."""
        limit, used = (
            self._number("memory.max", "memory.limit_in_bytes"),
            self._number("memory.current", "memory.usage_in_bytes"),
        )
        if limit is None or used is None or limit >= UNLIMITED:
            return None
        return Usage(max(0, used - self._inactive()), limit)

    def file(self, v2: str, v1: str) -> Path:
        return self.folder / (v2 if self.is_v2 else v1)

    def _number(self, v2: str, v1: str) -> int | None:
        try:
            text = self.file(v2, v1).read_text().strip()
        except OSError:
            return None
        return int(text) if text.isdigit() else None  # version 2 writes `max`

    def _inactive(self) -> int:
        key = "inactive_file" if self.is_v2 else "total_inactive_file"
        try:
            words = (line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        except OSError:
            return 0
        return next((int(word[1]) for word in words if len(word) == 2 and word[0] == key and word[1].isdigit()), 0)


def memory_groups() -> list[MemoryGroup]:
    """Return where the memory controller may be: this process's group and those above it, then the root.

    In a container the path is often that of the host, and the group is at the root.
    """
    found: list[MemoryGroup] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            root = CGROUPS / "memory" if controllers else CGROUPS
            own = root / path.lstrip("/")
            found += [
                MemoryGroup(folder, not controllers) for folder in (own, *own.parents) if folder.is_relative_to(root)
            ]
    return [*found, MemoryGroup(CGROUPS, True), MemoryGroup(CGROUPS / "memory", False)]


def memory_usage() -> Usage | None:
    """Return the memory of the group with the least room, or None if no group has a limit."""
    usages = [usage for group in dict.fromkeys(memory_groups()) if (usage := group.usage()) is not None]
    return min(usages, key=lambda usage: usage.free, default=None)

"""A storage that counts what it is asked: on a store each call costs money."""

from __future__ import annotations

from typing import Any

from everstep.run_folder import RunFolder


class Counted:
    """Everything goes through to the real one."""

    def __init__(self, folder: RunFolder) -> None:
        self._real = folder.storage
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)

        def counted(*given: Any, **named: Any) -> Any:
            self.calls.append(" ".join([name, *map(str, given[:1])]))
            return method(*given, **named)

        return counted

    def since(self) -> list[str]:
        """What was asked since the last time."""
        found, self.calls = self.calls, []
        return found


def counted(folder: RunFolder) -> Counted:
    made = Counted(folder)
    folder.storage = made  # type: ignore[assignment]
    return made

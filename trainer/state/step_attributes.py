"""Plain attributes during one step: each pass starts from their values at the start of the step.

`self.calls += 1` in a forward pass then counts steps, and not the passes of a process, which depend on the world.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everstep.trainer.state.attributes import Attributes, is_plain, mark
from everstep.trainer.state.preserve import restorer

ABSENT = object()


class StepAttributes:
    """Attributes that passes change, found in a run's first step and set back before each further pass."""

    def __init__(self, attributes: Attributes, changing: set[str]) -> None:
        """`changing` holds the names that are found; it is part of a checkpoint."""
        self.attributes = attributes
        self.changing = changing
        self._marks: dict[str, Any] = {}
        self._kept: list[tuple[dict[str, Any], str, Any, Callable[[], object]]] = []

    def begin_step(self, watch: bool, keep: bool) -> None:
        """Keep the values at the start of a step, if `keep`; `watch` finds the attributes that passes change."""
        self._marks = self._seen() if watch else {}
        names = (self._marks if watch else sorted(self.changing)) if keep else ()
        self._kept = [_keep(*self.attributes.holder(name)) for name in names]

    def after_pass(self) -> None:
        if self._marks:
            self.changing.update(self._changed())

    def rewind(self) -> None:
        """Set the values at the start of the step, in place where that is possible."""
        for holder, key, value, restore in self._kept:
            if value is ABSENT:
                holder.pop(key, None)
            else:
                holder[key] = value
                restore()
        for name in [name for name in self.changing if self._marks and name not in self._marks]:
            holder, key = self.attributes.holder(name)
            holder.pop(key, None)

    def _seen(self) -> dict[str, Any]:
        return {name: mark(holder[key]) for name, holder, key in self.attributes.entries() if is_plain(holder[key])}

    def _changed(self) -> list[str]:
        """Return the attributes that a checkpoint would hold and that a pass has changed or made."""
        now = self._seen()
        return [
            name for name, value in now.items() if self.attributes.is_state(name) and value != self._marks.get(name)
        ]


def _keep(holder: dict[str, Any], key: str) -> tuple[dict[str, Any], str, Any, Callable[[], object]]:
    value = holder.get(key, ABSENT)
    return holder, key, value, restorer(value)

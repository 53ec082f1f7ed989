"""Checkpoints of a run that count: those of its line, which a later attempt may leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Lineage:
    """The checkpoints that the attempts of a run have restored: they say which other checkpoints count."""

    restored: Mapping[int, int]
    """Attempt → step that it restored."""

    def counts(self, step: int, attempt: int) -> bool:
        """True unless a later attempt has continued from an earlier step.

        A superseded attempt may still commit after its successor has started. Such a checkpoint is not part of the run,
        because the run has continued from an earlier one.
        """
        return all(step <= start for later, start in self.restored.items() if later > attempt)

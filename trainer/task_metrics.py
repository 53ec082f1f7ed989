"""Metrics that a task returns with its training loss: means over the items of a step on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everstep.errors import ConfigError
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.task import Loss

_NAMES = "kind step time loss lr norm items samples unit items_per_s steps_per_s data_wait memory_mb mfu"
TAKEN = frozenset(_NAMES.split())
"""Names of a training record's own entries."""


class TaskMetrics:
    """Sums and counts of the metrics of a step. All ranks hold the same names in the same order.

    Names are agreed on at the first microbatch. A name that appears later is counted from the next step on.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.places: dict[str, int] = {}
        self._new: set[str] = set()
        self._agreed = False
        self._sums = torch.zeros(0)

    def begin(self) -> None:
        """Set the sums to zero, at the beginning of a step."""
        self._sums = torch.zeros(1 + 2 * len(self.places), dtype=torch.float64, device=self.mesh.device)

    def add(self, loss: Loss, real: bool) -> None:
        """Add the metrics of a microbatch; padding (`real` is False) counts for nothing."""
        self._new |= loss.metrics.keys() - self.places.keys()
        if not self._agreed:
            self._agreed = True
            self._agree()
            self.begin()
        for name, value in loss.metrics.items():
            place = self.places.get(name)
            if real and place is not None:
                self._sums[place] += torch.as_tensor(value, device=self.mesh.device).detach().sum()
                self._sums[place + 1] += loss.count

    def joined(self, sums: Tensor) -> Tensor:
        """Append a flag for new names, and the metrics, to the sums of a step, for one common reduction."""
        if self._new:
            self._sums[0] = 1.0
        return torch.cat([sums, self._sums])

    def means(self, values: Sequence[float]) -> dict[str, float]:
        """Return the mean of each metric that some item had.

        All ranks call it for the same steps, since they agree on new names in it.

        Args:
            values: values that `joined` appended, reduced; fewer than the names if some were new after it.
        """
        found = [(name, values[at : at + 2]) for name, at in self.places.items() if at < len(values)]
        if values[0]:
            self._agree()
        return {name: total / count for name, (total, count) in found if count}

    def _agree(self) -> None:
        new = {name for found in self.mesh.gather(sorted(self._new)) for name in found} - self.places.keys()
        if taken := sorted(new & TAKEN):
            raise ConfigError(f"task.loss returned a metric {taken[0]!r}: a record has that already; rename it")
        for name in sorted(new):
            self.places[name] = 1 + 2 * len(self.places)
        self._new.clear()

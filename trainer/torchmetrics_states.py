"""Objects of torchmetrics that a task measures with: the same value on any number of processes.

The states of each microbatch are taken from the object, which begins the next one anew. Sums are added up in float64,
other states are put in the order of the microbatches of the whole batch or set, on rank 0, which computes the value.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.tensor_gather import gather_tensors

MOST_CELLS = 100
"""Numbers that one metric may give, each an entry of the record."""
PACKAGE = "torchmetrics"
State = tuple[str, str]
"""Name of a metric, and of one of its states."""


def objects_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a task's metrics that are objects of torchmetrics; it is not imported for that."""
    package = sys.modules.get(PACKAGE)
    if package is None:
        return {}
    return {name: value for name, value in metrics.items() if isinstance(value, package.Metric)}


def place_objects(task: object, device: torch.device) -> None:
    """Move the metric objects that are attributes of a task, or in a list or dict there, to the device."""
    if PACKAGE in sys.modules:
        for value in _values(list(vars(task).values()) if hasattr(task, "__dict__") else []):
            value.to(device)
        if isinstance(task, nn.Module):
            for value in _values(task.modules()):
                value.to(device)


def drop(metrics: Mapping[str, Any]) -> None:
    """Begin the objects anew, after a pass that is not measured."""
    for metric in objects_of(metrics).values():
        metric.reset()


def _values(values: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    for value in values:
        if isinstance(value, sys.modules[PACKAGE].Metric):
            yield value
        elif depth and isinstance(value, dict | nn.ModuleDict):
            yield from _values(value.values(), depth - 1)
        elif depth and isinstance(value, list | tuple | nn.ModuleList):
            yield from _values(value, depth - 1)


class MetricStates:
    """States of metric objects over many microbatches of all ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.metrics: dict[str, Any] = {}
        self._sums: dict[State, Tensor] = {}
        self._types: dict[State, torch.dtype] = {}
        self._parts: dict[State, list[tuple[tuple[int, ...], Tensor]]] = {}
        """Other states, each with its place in the order of microbatches."""

    def add(self, metrics: Mapping[str, Any], index: int, real: bool) -> None:
        """Take the states of the objects after a microbatch; padding (`real` is False) counts for nothing.

        Args:
            index: number of the microbatch in the whole batch or set.

        Raises:
            ConfigError: the value of an object would depend on the processes, or it was not updated.
        """
        for name, metric in metrics.items():
            if name not in self.metrics:
                _check(name, metric)
                self.metrics[name] = metric
            if not metric.update_called:
                raise ConfigError(
                    f"metric {name!r} ({type(metric).__name__}) was returned without an update: call its "
                    "update(preds, target) in the same pass"
                )
            if real:
                self._take(name, metric, index)
        for metric in metrics.values():
            metric.reset()

    def merge(self, other: MetricStates, number: int) -> None:
        """Add the states of another set, whose microbatches come after those of sets with lower numbers."""
        self.metrics |= other.metrics
        self._types |= other._types
        for state, total in other._sums.items():
            self._sums[state] = self._sums[state] + total if state in self._sums else total.clone()
        for state, parts in other._parts.items():
            self._parts.setdefault(state, []).extend(((number, *place), part) for place, part in parts)

    def values(self) -> dict[str, float]:
        """Return the numbers of all objects; all ranks call it.

        Raises:
            ConfigError: an object fails, or gives more than numbers.
        """
        mesh = self.mesh
        names = mesh.gather(sorted(self.metrics))
        if any(other != names[0] for other in names):
            every: set[str] = {name for found in names for name in found}
            lacking = sorted(name for name in every if not all(name in found for found in names))
            raise ConfigError(f"metric {lacking[0]!r} was returned on some processes only: return it in each pass")
        self._sum_up()
        parts = {state: self._gathered(state, reduction) for state, reduction in self._others()}
        return mesh.decide(lambda: self._computed(parts))

    def _take(self, name: str, metric: Any, index: int) -> None:
        from torchmetrics.utilities.data import dim_zero_sum

        for key, reduction in metric._reductions.items():
            value, state = getattr(metric, key), (name, key)
            if reduction is dim_zero_sum:
                self._types[state] = value.dtype
                added = value.detach().double()
                self._sums[state] = self._sums[state] + added if state in self._sums else added
            else:
                found = value if isinstance(value, list) else [value]
                places = self._parts.setdefault(state, [])
                places += [((index, number), part.detach()) for number, part in enumerate(found)]

    def _sum_up(self) -> None:
        """Add up the sums of all ranks; a rank without a real microbatch has none, and adds zeros."""
        from torchmetrics.utilities.data import dim_zero_sum

        wanted = [(name, key, metric) for name, metric in self.metrics.items() for key in metric._reductions]
        states = [(name, key) for name, key, metric in wanted if metric._reductions[key] is dim_zero_sum]
        shapes = self.mesh.gather([list(self._sums[s].shape) if s in self._sums else None for s in states])
        device = self.mesh.device
        for number, state in enumerate(states):
            known = [shape for shape in (each[number] for each in shapes) if shape is not None]
            shape = known[0] if known else []
            self._sums.setdefault(state, torch.zeros(shape, dtype=torch.float64, device=device))
        if states:
            whole = self.mesh.sum(torch.cat([self._sums[s].to(device).reshape(-1) for s in states]))
            pieces = torch.split(whole, [self._sums[s].numel() for s in states])
            for state, piece in zip(states, pieces, strict=True):
                self._sums[state] = piece.reshape(self._sums[state].shape)

    def _others(self) -> list[tuple[State, Any]]:
        from torchmetrics.utilities.data import dim_zero_sum

        all_of_them = [((n, key), r) for n, metric in self.metrics.items() for key, r in metric._reductions.items()]
        return [(state, reduction) for state, reduction in all_of_them if reduction is not dim_zero_sum]

    def _gathered(self, state: State, reduction: Any) -> Any:
        """Return a state over all microbatches in their order, on rank 0."""
        own = self._parts.get(state, [])
        found = gather_tensors([(place, part) for place, part in own], self.mesh)
        ordered = [part for _, part in sorted(found, key=lambda each: each[0])]
        metric = self.metrics[state[0]]
        if isinstance(metric._defaults[state[1]], list) or not ordered:
            return ordered
        stacked = torch.stack(ordered)
        return stacked if reduction is None else reduction(stacked)

    def _computed(self, parts: Mapping[State, Any]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, metric in self.metrics.items():
            for key in metric._reductions:
                state = (name, key)
                found = self._sums[state].to(self._types[state]) if state in self._sums else parts[state]
                moved = [each.to(metric.device) for each in found] if isinstance(found, list) else found
                setattr(metric, key, moved if isinstance(moved, list) else moved.to(metric.device))
            values |= numbers(name, _compute(name, metric))
        return values


def _compute(name: str, metric: Any) -> Any:
    metric._update_count, metric._computed, metric._to_sync = 1, None, False
    try:
        return metric.compute()
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"metric {name!r} ({type(metric).__name__}) fails: {said}") from error
    finally:
        metric.reset()
        metric._to_sync = metric.sync_on_compute


def _check(name: str, metric: Any) -> None:
    """Refuse objects whose value would depend on the number of processes."""
    from torchmetrics.utilities.data import dim_zero_mean

    kind = type(metric).__name__
    inner = [child for child in metric.modules() if child is not metric and objects_of({name: child})]
    if inner or not metric._reductions:
        raise ConfigError(
            f"metric {name!r} ({kind}) has its states in other metrics: return those under names of their own"
        )
    for key, reduction in metric._reductions.items():
        if reduction is dim_zero_mean:
            raise ConfigError(
                f"metric {name!r} ({kind}) keeps a mean ({key}), which would depend on the number of processes: "
                "return sums in Loss.metrics instead"
            )


def numbers(name: str, value: Any) -> dict[str, float]:
    """Return a metric's result as numbers: a tensor of several gives NAME/ROW/COLUMN, a dict NAME/KEY."""
    found = dict(_numbers(name, value))
    if len(found) > MOST_CELLS:
        raise ConfigError(
            f"metric {name!r} gives {len(found)} numbers (limit {MOST_CELLS}): choose one with an average, or return "
            "the cells that matter as sums"
        )
    return found


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}/{key}", inner)
    elif isinstance(value, Tensor) and value.dim():
        cells: Sequence[Any] = value.tolist()
        for number, inner in enumerate(cells):
            yield from _numbers(f"{name}/{number}", torch.tensor(inner, dtype=torch.float64))
    elif isinstance(value, Tensor | int | float):
        yield name, float(value)
    else:
        raise ConfigError(
            f"metric {name!r} gives a {type(value).__name__}, which is no number: a curve is drawn from data, choose a "
            "metric that sums it up"
        )

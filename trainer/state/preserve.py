"""Restoring buffers, modes, attributes and generators after passes that must not change the model."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from everstep.trainer.random_state import generators_preserved
from everstep.trainer.state.attributes import LONGEST, STRUCTURE, is_plain
from everstep.trainer.state.model_state import write

DEEPEST = 8
"""Levels of containers that are searched."""
Snapshot = list[tuple[dict[str, Any], str, Any, Callable[[], object]]]
"""(the dict that holds a value, its key, the value, a function that restores its content)."""


@contextlib.contextmanager
def preserved(model: nn.Module, *others: object) -> Iterator[None]:
    """Restore at the end all that passes may change in a model and in the task, and the generators.

    Args:
        others: objects whose attributes are restored too, such as the task.
    """
    things = [*model.modules(), *(thing for thing in others if hasattr(thing, "__dict__"))]
    kept, keys = _take(things), [(vars(thing), set(vars(thing))) for thing in things]
    with generators_preserved():
        try:
            yield
        finally:
            for attributes, names in keys:
                for name in [n for n in attributes.keys() - names if is_plain(attributes[n])]:
                    del attributes[name]
            _put_back(kept)


def _take(things: Iterable[object]) -> Snapshot:
    kept: Snapshot = []
    for thing in things:
        if isinstance(thing, nn.Module):
            kept += [(thing._buffers, name, buffer, restorer(buffer)) for name, buffer in thing._buffers.items()]
        kept += [
            (vars(thing), name, value, restorer(value)) for name, value in vars(thing).items() if name not in STRUCTURE
        ]
    return kept


def _put_back(kept: Snapshot) -> None:
    for holder, name, value, restore in kept:
        holder[name] = value
        restore()


def restorer(value: Any, depth: int = 0) -> Callable[[], object]:
    """Return a function that restores the present content of a tensor, an array or a container."""
    if isinstance(value, Tensor) and not value.requires_grad and not value.is_meta:
        return functools.partial(write, value.detach(), value.detach().clone())
    if isinstance(value, np.ndarray) and is_plain(value) and value.flags.writeable:
        return functools.partial(np.copyto, value, value.copy())
    if not isinstance(value, list | dict | set | deque):
        return _nothing
    items = dict(value) if isinstance(value, dict) else list(value)
    looked_into = depth < DEEPEST and len(value) <= LONGEST and not isinstance(value, set)
    inner = items.values() if isinstance(items, dict) else items
    return functools.partial(_refill, value, items, [restorer(i, depth + 1) for i in inner] if looked_into else ())


def _refill(value: Any, items: Any, inner: Iterable[Callable[[], object]]) -> None:
    value.clear()
    value.extend(items) if isinstance(value, list | deque) else value.update(items)
    for restore in inner:
        restore()


def _nothing() -> None:
    """Do nothing, for a value that cannot change."""

"""Passes through a user's model that leave no trace: buffers, modes, attributes and generators are put back."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.attributes import STRUCTURE, is_plain
from trainer.model_state import write

Snapshot = list[tuple[dict[str, Any], str, Any, Any]]
"""(the dict that holds a value, its key, the value, a copy of what may change within it)."""


@contextlib.contextmanager
def preserved(model: nn.Module, *others: object) -> Iterator[None]:
    """Put back, at the end, all that passes may change in a model and in the task, and the state of the generators."""
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


@contextlib.contextmanager
def generators_preserved() -> Iterator[None]:
    """Put the states of torch's, NumPy's and Python's global generators back at the end."""
    python, array = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def _take(things: Iterable[object]) -> Snapshot:
    kept: Snapshot = []
    for thing in things:
        if isinstance(thing, nn.Module):
            for name, buffer in thing._buffers.items():
                kept.append((thing._buffers, name, buffer, None if buffer is None else buffer.detach().clone()))
        for name, value in vars(thing).items():
            if name not in STRUCTURE:
                kept.append((vars(thing), name, value, _inside(value)))
    return kept


def _inside(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.requires_grad and not value.is_meta:
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, list | dict | set | deque) else None


def _put_back(kept: Snapshot) -> None:
    for holder, name, value, inside in kept:
        holder[name] = value
        if isinstance(value, Tensor) and inside is not None:
            write(value.detach(), inside)
        elif isinstance(value, list | dict | set | deque):
            value.clear()
            value.extend(inside) if isinstance(value, list | deque) else value.update(inside)

"""A call of a model as its task makes it, on real samples: the example that tracing formats need."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from everstep.errors import ConfigError
from everstep.trainer.data.fetcher import Fetcher, MicrobatchRequest
from everstep.trainer.data.ordering.order import Ids
from everstep.trainer.inference.session import Session
from everstep.trainer.task_calls import inputs

SAMPLES = 100


@dataclass(frozen=True)
class RecordedCall:
    """Arguments of one forward pass, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    """Tensors of the output, flat, in the order of torch's pytree."""
    samples: int

    def described(self) -> dict[str, Any] | None:
        """Return shape and type of each argument, null for the number of samples; None if some are no tensors."""

        def one(value: Tensor) -> dict[str, Any]:
            free = value.dim() > 0 and len(value) == self.samples
            return {"shape": [None, *value.shape[1:]] if free else [*value.shape], "dtype": str(value.dtype)[6:]}

        if not all(isinstance(value, Tensor) for value in (*self.args, *self.kwargs.values())):
            return None
        return {"args": [one(each) for each in self.args], "kwargs": {n: one(each) for n, each in self.kwargs.items()}}

    def by_name(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments by the names of the parameters of `forward`."""
        return dict(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)


NO_CALL = RecordedCall((), {}, [], 0)


def record(session: Session, data: Fetcher, dtype: torch.dtype | None = None) -> RecordedCall:
    """Let the task predict (or evaluate) real samples, and return its first call of the model.

    Args:
        dtype: type that floating-point arguments are cast to; None leaves them.

    Raises:
        ConfigError: the task does not call the model.
    """
    return call_of(session, data, np.arange(min(SAMPLES, len(data.dataset))), dtype)[0]


def call_of(
    session: Session, data: Fetcher, ids: Ids, dtype: torch.dtype | None = None
) -> tuple[RecordedCall, list[int]]:
    """Return the task's first call of the model on these samples, and those that could be decoded."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    model = session.model.module
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    found = data(MicrobatchRequest(ids, np.zeros_like(ids), 0))
    if not found.real:
        raise ConfigError(f"none of the samples {ids.tolist()} can be used: excluded or not decodable; choose others")
    passes = getattr(session.task, "predict", session.task.evaluate)
    try:
        if dtype is None:
            passes(model, inputs(found.batch, session.model.cast))
        else:
            passes(model, _cast(inputs(found.batch, session.model.cast), dtype))
    finally:
        handle.remove()
    if not calls:
        kind = type(session.task).__name__
        raise ConfigError(f"the task {kind} does not call the model as model(…): there is no example to trace it with")
    args, kwargs = _cast(calls[0], dtype)
    return RecordedCall(args, kwargs, flat(model(*args, **kwargs)), len(found.ids)), found.ids.tolist()


def flat(output: Any) -> list[Tensor]:
    """Return the tensors of an output."""
    return [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    if isinstance(value, Mapping):
        return {name: _cast(inner, dtype) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(inner, dtype) for inner in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

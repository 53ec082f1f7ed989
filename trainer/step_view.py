"""View of a step for hooks that ask: model, batch, outputs, and gradient norms by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from everstep.errors import ConfigError
from everstep.trainer.distributed.parallel import ParallelModel

H = TypeVar("H", bound=Callable[..., Any])


@dataclass(frozen=True)
class Ask:
    """Steps at which a hook is called, and what it sees there; a decorator of functions and classes."""

    every: int
    gradients: bool = False
    batch: bool = False
    outputs: bool = False

    def __call__(self, hook: H) -> H:
        hook.asks = self  # type: ignore[attr-defined]
        return hook

    def due(self, step: int) -> bool:
        return step % self.every == 0


@runtime_checkable
class AskingHook(Protocol):
    """A hook, or a class of hooks, with an attribute `asks`, which `every` gives it."""

    asks: Ask


def every(n: int = 1, *, gradients: bool = False, batch: bool = False, outputs: bool = False) -> Ask:
    """Have a hook called every n steps only, with the model as it is after exactly that step.

    As a decorator of a function or class, or in `__init__` as `self.asks = every(n)`.

    Args:
        gradients: `StepInfo.gradients` has the norm of each parameter's gradient by name, before clipping.
        batch: `StepInfo.batch` is this process's first microbatch of the step.
        outputs: `StepInfo.outputs` is what the model returned for it.
    """
    if n < 1:
        raise ConfigError(f"every({n}): must be at least 1 step")
    return Ask(n, gradients, batch, outputs)


def ask_of(hook: object, name: str) -> Ask | None:
    """Return what a hook asks for; None if it is called at every step and sees numbers only."""
    inner = hook.func if isinstance(hook, functools.partial) else hook
    if not isinstance(inner, AskingHook):
        return None
    if not isinstance(inner.asks, Ask):
        raise ConfigError(f"{name}: its attribute 'asks' is a {type(inner.asks).__name__}; set it to every(n)")
    return inner.asks


class StepView:
    """View of one step, for the hooks that are due there."""

    def __init__(self, asks: Sequence[Ask], parallel: ParallelModel, share: float) -> None:
        """`share` is the factor by which gradients are too small, times the items of the step."""
        self.wants = Ask(1, *(any(getattr(a, key) for a in asks) for key in ("gradients", "batch", "outputs")))
        self.parallel = parallel
        self.share = share
        self.model = parallel.model
        self.batch: Mapping[str, Tensor] | None = None
        self.outputs: Any = None
        self._norms: Tensor | None = None
        self._hook = parallel.module.register_forward_hook(self._keep) if self.wants.outputs else None

    def see(self, batch: Mapping[str, Tensor]) -> None:
        """Keep the first microbatch, as the task gets it."""
        if self.wants.batch and self.batch is None:
            self.batch = batch

    def measure(self) -> None:
        """Measure the gradients, before they are scaled, clipped and dropped; nothing waits for the device."""
        if self.wants.gradients:
            self._norms = self.parallel.norms()

    def gradients(self, items: float, loss_scale: float) -> dict[str, float]:
        """Return the norms by name; on a GPU one transfer."""
        if self._norms is None:
            return {}
        factor = self.share / (items or 1.0) / loss_scale
        names = [name for name, p in self.model.named_parameters()]
        return {name: norm * factor for name, norm in zip(names, self._norms.tolist(), strict=True)}

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep(self, module: object, given: object, output: Any) -> None:
        self.outputs = _detached(output)
        self.close()


def view_of(step: int, asks: Iterable[Ask], parallel: ParallelModel, share: float) -> StepView | None:
    """Return the view of a step; None if no hook that asks is due."""
    due = [ask for ask in asks if ask.due(step)]
    return StepView(due, parallel, share) if due else None


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_detached(inner) for inner in value]
    return value

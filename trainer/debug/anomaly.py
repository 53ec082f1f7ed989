"""Search for the layer of the first NaN or Inf: hooks on all layers, and autograd's own checks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import DivergedError

AUTOGRAD = "returned nan values"
"""Part of the message with which autograd's anomaly mode ends a backward pass."""


class LayerCheck:
    """Checks of every layer's outputs, and of the gradients that arrive there; each waits for the device."""

    def __init__(self, model: nn.Module) -> None:
        self.passed = ""
        """Layer at which the backward pass was last known to be finite."""
        self._hooks = [
            module.register_forward_hook(self._checker(name or type(model).__name__))
            for name, module in model.named_modules()
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _checker(self, name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    given = "finite" if all(map(_finite, _tensors(inputs))) else "already not finite"
                    raise DivergedError(
                        f"debug.anomaly: the output of layer {name} ({type(module).__name__}) is the first that is "
                        f"not finite; its inputs are {given}"
                    )
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_checker(name, type(module).__name__))  # type: ignore[no-untyped-call]

        return check

    def _gradient_checker(self, name: str, kind: str) -> Any:
        def check(gradient: Tensor) -> None:
            if not _finite(gradient):
                after = f", and was at that of {self.passed}" if self.passed else ""
                raise DivergedError(
                    f"debug.anomaly: the gradient is not finite at the output of layer {name} ({kind}){after}"
                )
            self.passed = name

        return check


@contextlib.contextmanager
def anomalies_named(model: nn.Module) -> Iterator[None]:
    """Raise DivergedError with the name of a layer at the first NaN or Inf in this block."""
    check = LayerCheck(model)
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    except RuntimeError as error:
        if AUTOGRAD not in str(error):
            raise
        place = f"before the output of layer {check.passed}" if check.passed else "in the loss"
        said = " ".join(str(error).split())
        raise DivergedError(
            f"debug.anomaly: {said} The gradient turns NaN {place}; torch printed the line of the forward pass"
        ) from error
    finally:
        check.remove()


def nonfinite_gradients(model: nn.Module) -> str:
    """Return the last parameter whose gradient is not finite, the first that a backward pass meets."""
    names = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    more = f" and of {len(names) - 1} parameters before it" if len(names) > 1 else ""
    return names[-1] + more if names else ""


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(getattr(value, "_local_tensor", value)).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)

"""Inputs of a model that can be explained: floating-point arguments, and embedded integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class ModelInput:
    """One argument of the model, as the continuous values that gradients flow to."""

    column: str
    raw: Tensor
    """Argument as the task passes it: [n, …]."""
    values: Tensor
    """The argument, or its embeddings [n, …, width]: these get the attributions."""
    embedding: nn.Embedding | None = None

    def forward(self, model: nn.Module, names: Sequence[str]) -> Forward:
        """Return a function (values, *arguments) -> output of the model, with this input's values replaced."""

        def run(values: Tensor, *arguments: Any) -> Any:
            given = dict(zip(names, arguments, strict=True))
            if self.embedding is None:
                return model(**{**given, self.column: values})
            handle = self.embedding.register_forward_hook(lambda *_: values)
            try:
                return model(**given)
            finally:
                handle.remove()

        return run


def model_inputs(model: nn.Module, arguments: Mapping[str, Any], samples: int) -> list[ModelInput]:
    """Return the inputs that can be explained.

    Args:
        arguments: the model's arguments by name, of `samples` samples.

    Raises:
        ConfigError: there are only integers that no embedding reads.
    """
    tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.dim() and len(v) == samples}
    found = [ModelInput(name, value, value) for name, value in tensors.items() if value.is_floating_point()]
    integers = {name: value for name, value in tensors.items() if not value.is_floating_point()}
    found += _embedded(model, arguments, integers)
    if not found:
        shown = ", ".join(f"{name} ({str(value.dtype)[6:]})" for name, value in tensors.items()) or "none"
        raise ConfigError(
            f"explain: no input of the model has gradients (tensors of the call: {shown}); "
            "pass floating-point inputs, or read integers by an nn.Embedding"
        )
    return found


def _embedded(model: nn.Module, arguments: Mapping[str, Any], integers: Mapping[str, Tensor]) -> list[ModelInput]:
    """Return an input for each argument of integers that an embedding reads, as it is or modulo its rows."""
    calls: list[tuple[nn.Embedding, Tensor, Tensor]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]
    handles = [
        layer.register_forward_hook(lambda layer, args, out: calls.append((layer, args[0], out.detach())))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, value in integers.items():
        for layer, read, out in calls:
            if read.shape == value.shape and torch.equal(read.long(), value.long() % layer.num_embeddings):
                if sum(other is layer for other, _, _ in calls) > 1:
                    raise ConfigError(
                        f"explain: an embedding that reads {name} is called several times in a pass; "
                        "call it once, or once for each input"
                    )
                found.append(ModelInput(name, value, out, layer))
                calls = [call for call in calls if call[0] is not layer]
                break
    return found

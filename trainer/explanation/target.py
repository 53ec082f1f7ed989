"""The number of each sample that is explained: one of the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everstep.errors import ConfigError


def scores(output: Any) -> Tensor:
    """Return the outputs to choose from, [n, choices].

    Of outputs [n, steps, k] the last step counts. Two vectors of one width, as of image and text, give their product.

    Raises:
        ConfigError: the output has another form.
    """
    if isinstance(output, Mapping):
        values = [value for value in output.values() if isinstance(value, Tensor)]
        if len(values) == 2 and values[0].shape == values[1].shape and values[0].dim() == 2:
            return (values[0] * values[1]).sum(dim=1, keepdim=True)
    if isinstance(output, Tensor) and output.is_floating_point():
        if output.dim() == 1:
            return output[:, None]
        if output.dim() == 2:
            return output
        if output.dim() == 3:
            return output[:, -1]
    form = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ConfigError(
        f"explain: the model returns {form}; it explains [n], [n, classes], the last of [n, steps, k], and two vectors"
    )


def targets(found: Tensor, asked: int | None) -> Tensor:
    """Return the column of `scores` for each sample, int64 [n]: the one asked for, else the greatest."""
    if asked is None:
        return found.argmax(dim=1)
    if not 0 <= asked < found.shape[1]:
        raise ConfigError(f"--target {asked}: the model has {found.shape[1]} outputs (0 to {found.shape[1] - 1})")
    return torch.full((len(found),), asked, device=found.device)

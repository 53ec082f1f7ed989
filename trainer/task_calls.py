"""The batch that is handed to a task, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.errors import ConfigError, nearest
from trainer.task import Loss


class Inputs(dict[str, Tensor]):
    """A microbatch that tells a task which wants another column so: its data and its task do not go together."""

    def __missing__(self, name: str) -> Tensor:
        raise ConfigError(
            f"a batch has {', '.join(self)}, and the task asks for {name!r}: "
            f"choose data= and task= that go together{nearest(name, self)}"
        )


def inputs(batch: Mapping[str, Tensor], cast: torch.dtype | None) -> Inputs:
    """The batch as the model takes it: floats in the type of its weights where that is not fp32."""
    if cast is None:
        return Inputs(batch)
    return Inputs({name: value.to(cast) if value.is_floating_point() else value for name, value in batch.items()})


def checked(loss: object, method: str) -> Loss:
    """Return what a task gave, if it is a Loss with a scalar sum and a count.

    Raises:
        ConfigError: it is something else; the line says what to return.
    """
    if not isinstance(loss, Loss):
        raise ConfigError(
            f"task.{method} returned a {type(loss).__name__}: return Loss(sum=…, count=…), the loss summed over the "
            "items and their number; a mean over n items is Loss(mean * n, n)"
        )
    if not isinstance(loss.sum, Tensor) or loss.sum.numel() != 1:
        shape = list(loss.sum.shape) if isinstance(loss.sum, Tensor) else type(loss.sum).__name__
        raise ConfigError(f"task.{method} returned Loss(sum={shape}): sum must be one number; add up the items")
    for name, value in loss.metrics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ConfigError(
                f"task.{method} returned a metric {name!r} of shape {list(value.shape)}: a metric is one number, "
                "summed over the items"
            )
    return loss

"""What a user plugs in: a task says what the model is and what its loss is; Everstep does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""Named tensors of one microbatch; the first dimension of each is the number of samples."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over the items of one microbatch; Everstep divides by the count of the whole global batch.

    A mean would make the result depend on how the batch was cut, so a task returns sums and says over
    how many items (samples, tokens, pixels …) they go.
    """

    sum: Tensor
    """Scalar, differentiable: the loss summed over the items."""
    count: Tensor | int
    """How many items were summed."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars summed over the same items, reported as sum / count, in training at each record (`log.every`)."""


class Task(Protocol):
    """The plug-in. `examples/` holds one of 30 lines; `trainer/tasks/` holds ours.

    A task may also have `unit`, the name of the items that `Loss.count` counts ("tokens"), and
    `preview(model) -> str`: it is called on all ranks when training is done, and rank 0 shows what it
    returns (a generated text, say). The model is as it was trained, wrapped in DDP or sharded by FSDP. A preview that
    raises is a warning; the run is done.
    """

    def model(self) -> nn.Module:
        """The network, newly initialised from torch's global random state, on the current default device."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The training loss of one microbatch. Call `model(...)` once; it may be wrapped in DDP or FSDP."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """The same on held-out data, without gradients, with the metrics that the user wants to see."""
        ...

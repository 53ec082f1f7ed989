"""Task: the plug-in of a user, which defines the model and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""Named tensors of one microbatch; the first dimension of each is the number of samples."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over the items of one microbatch; everstep divides by the count of the whole global batch.

    A mean would make the result depend on how the batch was split, so a task returns sums and the number of items
    (samples, tokens, pixels …) in them.
    """

    sum: Tensor
    """Scalar, differentiable: the loss summed over the items."""
    count: Tensor | int
    """Number of items in the sums."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Scalars summed over the items, reported as sum / count; or torchmetrics updated in this pass.

    In training they are reported at each record (`log.every`), and measure the step of the record, as the loss does.
    """


class Task(Protocol):
    """A task. `examples/` has one of 30 lines; `trainer/tasks/` has ours.

    A task may also have `unit`, the name of the items that `Loss.count` counts ("tokens"), and `preview(model) -> str`:
    it is called on all ranks when training is done, and rank 0 shows its result (a generated text, say). The model is
    as it was trained, wrapped in DDP or sharded by FSDP. An exception in a preview is a warning; the run is done.
    `everstep predict` calls its `predict(model, batch) -> dict[str, Tensor]`, with a row for each sample.
    """

    def model(self) -> nn.Module:
        """Return the network, newly initialised from torch's global random state, on the default device."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the training loss of one microbatch.

        Call `model(...)` once; it may be wrapped in DDP or FSDP.
        """
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss on held-out data, without gradients, with the metrics to report."""
        ...


class AlternatingTask(Protocol):
    """A task whose optimizers take turns (`optimizer=alternating`): a task, with a loss for each turn."""

    def model(self) -> nn.Module:
        """Return the network with all parts, newly initialised."""
        ...

    def loss(self, model: nn.Module, batch: Batch, turn: str) -> Loss:
        """Return the loss of one microbatch for the optimizer of that name, which trains its parameters alone."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss on held-out data, which has no turn."""
        ...

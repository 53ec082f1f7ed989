"""Results of one step: pending on the device, and as hooks and records get them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from everstep.trainer.step_view import StepView


@dataclass(frozen=True)
class StepInfo:
    """Results of one step, for hooks and metrics.

    Attributes:
        step: 1 is the first.
        loss: mean over the items of the global batch.
        items: number of items (samples, tokens …) in the loss.
        norm: 2-norm of the gradient before clipping.
        finite: False if the step changed nothing because of NaN or Inf.
        overflow: True if fp16's loss scale was too large; it is then reduced by itself, and `finite` is True.
        empty: True if no item of the batch counts, so that the step changed nothing; then `loss` is NaN.
        stop: True if any rank was asked to stop.
        save_failed: True if a save has failed and its retry is due (see checkpointer.py).
        model: the model, as after this step; for hooks that ask, as all below (`every`).
        batch: the first microbatch of this process.
        outputs: what the model returned for it.
        gradients: norm of each parameter's gradient by name.
        metrics: mean over the items of each metric that `task.loss` returned; of objects, at the steps of `log.every`.
    """

    step: int
    loss: float
    items: int
    norm: float
    lr: float
    finite: bool
    stop: bool
    save_failed: bool = False
    overflow: bool = False
    empty: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    batch: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    outputs: Any = field(default=None, repr=False, compare=False)
    gradients: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class PendingStep:
    """Results of a step that are still on the device.

    `facts` are loss sum, items, asked, save_failed, norm, bad, loss scale, then the values that `TaskMetrics.joined`
    appended.
    """

    step: int
    lr: float
    facts: Tensor | list[float]
    ready: torch.cuda.Event | None
    means: Callable[[Sequence[float]], dict[str, float]]
    view: StepView | None = None

    def read(self) -> StepInfo:
        """Return the results; on CUDA, wait until the device has finished this step."""
        if self.ready is not None:
            self.ready.synchronize()
        loss, items, asked, save_failed, norm, bad, scale, *metrics = (
            self.facts if isinstance(self.facts, list) else self.facts.tolist()
        )
        overflow = bool(bad) and scale > 1 and math.isfinite(loss)
        view = self.view
        seen: dict[str, Any] = (
            {}
            if view is None
            else {
                "model": view.model,
                "batch": view.batch,
                "outputs": view.outputs,
                "gradients": view.gradients(items, scale),
            }
        )
        return StepInfo(
            self.step,
            loss / items if items else float("nan"),
            int(items),
            norm,
            self.lr,
            finite=not bad or overflow,
            stop=asked > 0,
            save_failed=save_failed > 0,
            overflow=overflow,
            empty=not items,
            metrics=self.means(metrics),
            **seen,
        )

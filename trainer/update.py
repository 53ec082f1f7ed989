"""Update of the weights from a step's gradients: normalise, clip, check for NaN, apply.

On the CPU the few scalars are floats: as tensors of one element they cost a small model's step 5 %. On a GPU they stay
tensors, so that the host does not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everstep.trainer.debug.anomaly import nonfinite_gradients
from everstep.trainer.distributed.parallel import ParallelModel
from everstep.trainer.optim import by_dtype
from everstep.trainer.optimizers.alternating import turns_of
from everstep.trainer.state.train_state import TrainState
from everstep.trainer.step_view import StepView


@dataclass(frozen=True)
class Applied:
    """Result of an update, as floats on the CPU and as float64 tensors on a GPU."""

    facts: Tensor | list[float]
    """Loss sum, items, asked, save_failed, norm, bad, loss scale."""
    skipped: Tensor | bool
    """True (1.0) for a step that changed nothing."""


class Update:
    """Applies the gradients of one step.

    A step with NaN or Inf, or without an item that counts, changes nothing.
    """

    def __init__(self, state: TrainState, parallel: ParallelModel, clip: float | None, global_batch: int) -> None:
        self.state = state
        self.parallel = parallel
        self.clip = clip
        self.share = parallel.ranks * global_batch
        """Factor by which gradients are too small: the mean over ranks, times the weight of a loss sum."""
        self.on_host = parallel.mesh.device.type != "cuda"
        self.masks = not self.on_host and any(group.get("fused") for group in state.optimizer.param_groups)
        """True if the optimizer's kernels skip an update after NaN or Inf; else the host has to read the flag."""
        self.turns = turns_of(state.optimizer)
        self.view: StepView | None = None
        """View of the step for hooks, which measures the gradients before they are scaled."""
        self.nonfinite = ""
        """Parameters whose gradients were not finite in the last step that was bad; unknown on a GPU."""

    @torch.no_grad()
    def __call__(self, sums: Tensor) -> Applied:
        """Apply the gradients of the step.

        Args:
            sums: [4] float64: loss sum, items, asked, save_failed, summed over all ranks.
        """
        self.parallel.reduce_whole()
        if self.turns is not None:
            self.turns.keep(self.state.progress.step + 1)
        if self.view is not None:
            self.view.measure()
        gradients = self.parallel.gradients()
        norm = self.parallel.norm(gradients)
        applied = self._on_host(sums, gradients, norm) if self.on_host else self._on_device(sums, gradients, norm)
        self.parallel.drop_gradients()
        return applied

    def _on_host(self, sums: Tensor, gradients: Sequence[Tensor], norm_of_sums: Tensor) -> Applied:
        scale = self.state.scale
        loss_sum, items, asked, save_failed = sums.tolist()
        loss_scale = 1.0 if scale is None else scale.scale.item()
        inverse = self.share / (items or 1.0) / loss_scale
        norm = norm_of_sums.item() * inverse
        bad = items != 0 and not math.isfinite(norm + loss_sum)
        skipped = bad or items == 0
        if bad:
            self.nonfinite = nonfinite_gradients(self.parallel.model)
        if not skipped:
            if self.clip is not None:
                inverse *= min(self.clip / (norm + 1e-6), 1.0)
            for group in by_dtype(gradients):
                torch._foreach_mul_(group, inverse)
            self.state.optimizer.step()
            if self.state.average is not None:
                self.state.average.update()
        if scale is not None:
            scale.update(sums.new_tensor(bad, dtype=torch.float32), sums.new_tensor(items == 0, dtype=torch.bool))
        return Applied([loss_sum, items, asked, save_failed, norm, float(bad), loss_scale], skipped)

    def _on_device(self, sums: Tensor, gradients: Sequence[Tensor], norm_of_sums: Tensor) -> Applied:
        scale = self.state.scale
        loss_sum, items, _, _ = sums.unbind()
        empty = items == 0
        inverse = self.share / torch.where(empty, 1.0, items)
        loss_scale = sums.new_ones(()) if scale is None else scale.scale.double()
        inverse = inverse / loss_scale
        norm = norm_of_sums * inverse
        total = norm + loss_sum
        bad = ((total - total != 0.0) & ~empty).float()  # only NaN and Inf do not cancel
        if self.clip is not None:
            inverse = inverse * torch.clamp(self.clip / (norm + 1e-6), max=1.0)
        for group in by_dtype(gradients):
            double = group[0].dtype in (torch.float64, torch.complex128)
            torch._foreach_mul_(group, inverse.to(torch.float64 if double else torch.float32))
        skipped = torch.maximum(bad, empty.float())
        self._apply(skipped)
        facts = torch.cat([sums, torch.stack([norm.double(), bad.double(), loss_scale])])
        if scale is not None:
            scale.update(bad, empty)
        return Applied(facts, skipped)

    def _apply(self, skipped: Tensor) -> None:
        optimizer, average = self.state.optimizer, self.state.average
        if self.masks:
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
            if average is not None:
                average.update(skipped)
        elif not skipped.item():
            optimizer.step()
            if average is not None:
                average.update()

"""One optimizer step: the microbatches of a global batch forward and backward, then the update.

What the step computes does not depend on the number of processes: randomness is seeded by (seed, step, microbatch), and
gradients of sums are divided by the count of items in the whole global batch. Nothing here waits for the device; what
a step measured is read later, from `Pending`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import Dtype, RunConfig
from trainer.data.gather import Microbatch
from trainer.errors import ConfigError, nearest
from trainer.optim import lr_factor, set_lr
from trainer.parallel import Spread
from trainer.state import TrainState
from trainer.stop import Stop
from trainer.task import Task

MASK = 2**64 - 1


@dataclass(frozen=True)
class StepInfo:
    """What one step did; what hooks and metrics see.

    Attributes:
        step: 1 is the first.
        loss: mean over the items of the global batch.
        items: samples, tokens … that the loss went over.
        norm: 2-norm of the gradient before clipping.
        finite: False when NaN or Inf made the step change nothing.
        stop: whether any rank was asked to stop.
        unsaved: whether a save came to nothing and should be tried again now.
    """

    step: int
    loss: float
    items: int
    norm: float
    lr: float
    finite: bool
    stop: bool
    unsaved: bool = False


@dataclass(frozen=True)
class Pending:
    """A step's results while they are still on the device: loss sum, items, asked, unsaved, norm, bad."""

    step: int
    lr: float
    packed: Tensor
    ready: torch.cuda.Event | None

    def read(self) -> StepInfo:
        """Waits, on CUDA, until the device has come to the end of this step."""
        if self.ready is not None:
            self.ready.synchronize()
        loss, items, asked, unsaved, norm, bad = self.packed.tolist()
        return StepInfo(
            self.step,
            loss / items if items else float("nan"),
            int(items),
            norm,
            self.lr,
            not bad,
            asked > 0,
            unsaved > 0,
        )


class Stepper:
    """Calls add one step each to the state; `results` gives what they measured, on CUDA some steps later."""

    def __init__(
        self,
        run: RunConfig,
        state: TrainState,
        spread: Spread,
        task: Task,
        stop: Stop,
        unsaved: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run = run
        self.state = state
        self.spread = spread
        self.task = task
        self.stop = stop
        self.unsaved = unsaved
        self.device = spread.mesh.device
        self.cast = torch.float64 if run.precision.dtype is Dtype.fp64 else None
        on_cuda = self.device.type == "cuda"
        self.lag = 2 if on_cuda else 0
        """Steps after which results are read, the same on all ranks, so that no step waits for the device."""
        self.masks = on_cuda and any(group.get("fused") for group in state.optimizer.param_groups)
        """Whether the optimizer itself leaves the weights alone after NaN or Inf; else the host looks."""
        self.weight = torch.full((), 1.0 / run.global_batch, dtype=self.cast or torch.float32, device=self.device)
        """Gradient of each loss sum: it holds gradients small until the items of the whole batch are counted."""
        self._pending: deque[Pending] = deque()

    def __call__(self, batches: Sequence[Microbatch]) -> None:
        step, run = self.state.progress.step + 1, self.run
        factor = lr_factor(step, run.schedule.over_steps or run.steps, run.schedule)
        set_lr(self.state.optimizer, factor)
        sums = self._backward(step, batches)
        norm, bad = self._update(sums)
        self.state.progress.step = step
        lr = self.state.optimizer.param_groups[0]["lr"]
        self._pending.append(self._pend(step, lr, torch.cat([sums, torch.stack([norm, bad]).double()])))

    def results(self, *, all_of_them: bool = False) -> list[StepInfo]:
        """Results that are due, oldest first; all that are outstanding before a checkpoint or an evaluation."""
        due = len(self._pending) - (0 if all_of_them else self.lag)
        return [self._pending.popleft().read() for _ in range(due)]

    def rehearse(self, batch: Mapping[str, Tensor]) -> int:
        """Forward and backward through one microbatch with weight zero, reduced over the ranks; returns its items."""
        with self.spread.reduce_on(True):
            with self.spread.autocast():
                loss = self.task.loss(self.spread.module, inputs(batch, self.cast))
            loss.sum.backward(self.weight * 0.0)  # type: ignore[no-untyped-call]
        self.spread.drop_gradients()
        return int(loss.count)

    def forget(self) -> None:
        """Drop outstanding results: the steps that they speak of have been rolled back."""
        self._pending.clear()

    def _backward(self, step: int, batches: Sequence[Microbatch]) -> Tensor:
        """Gradients of the loss sum over `global_batch`; returns loss sum, items, asked, unsaved of all (float64)."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        loss_sum, items, asked, unsaved = sums.unbind()
        if self.stop.asked:
            asked.fill_(1.0)
        if self.unsaved():
            unsaved.fill_(1.0)
        weight = self.weight if self.state.scale is None else self.weight * self.state.scale.scale
        work = None
        for number, microbatch in enumerate(batches):
            last = number == len(batches) - 1
            seed_randomness(self.run.seed, step, microbatch.index, self.device)
            with self.spread.reduce_on(last):
                with self.spread.autocast():
                    loss = self.task.loss(self.spread.module, inputs(microbatch.batch, self.cast))
                if microbatch.real:
                    loss_sum += loss.sum.detach()
                    items += loss.count
                if last and self.spread.mesh.world > 1:
                    # Under way while the last backward pass computes.
                    work = dist.all_reduce(sums, async_op=True)
                loss.sum.backward(weight if microbatch.real else weight * 0.0)  # type: ignore[no-untyped-call]
        if work is not None:
            work.wait()
        return sums

    @torch.no_grad()
    def _update(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise, clip and apply the gradients; returns (norm, bad)."""
        scale = self.state.scale
        gradients = self.spread.gradients()
        loss_sum, items, _, _ = sums.unbind()
        inverse = self.spread.ranks * self.run.global_batch / items
        if scale is not None:
            inverse = inverse / scale.scale
        norm = self.spread.norm(gradients) * inverse
        total = norm + loss_sum
        bad = (total - total != 0.0).float()  # NaN and Inf are what does not cancel
        if self.run.clip is not None:
            inverse = inverse * torch.clamp(self.run.clip / (norm + 1e-6), max=1.0)
        if gradients:
            torch._foreach_mul_(gradients, inverse.to(gradients[0].dtype))
        self._apply(bad)
        if scale is not None:
            scale.update(bad)
        if self.state.average is not None:
            self.state.average.update()
        self.spread.drop_gradients()
        return norm, bad

    def _apply(self, bad: Tensor) -> None:
        optimizer = self.state.optimizer
        if self.masks:
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.step()
        elif not bad.item():
            optimizer.step()

    def _pend(self, step: int, lr: float, packed: Tensor) -> Pending:
        if self.device.type != "cuda":
            return Pending(step, lr, packed, None)
        host = packed.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Pending(step, lr, host, ready)


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


def seed_randomness(seed: int, step: int, index: int, device: torch.device) -> None:
    """Seed dropout and the like for one microbatch, whoever computes it."""
    mixed = _mix(_mix(_mix(seed & MASK) ^ step) ^ index) >> 1
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)


def _mix(value: int) -> int:
    """One round of splitmix64 (Steele, Lea, Flood 2014): neighbours in, strangers out."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)

"""One optimizer step: the microbatches of a global batch forward and backward, then the update.

The result does not depend on the number of processes: randomness is seeded by (seed, step, microbatch), and gradients
of sums are divided by the count of items in the whole global batch. Nothing in a step waits for the device; its results
are read later, from `PendingStep`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from everstep.config import ScheduleConfig
from everstep.errors import ConfigError
from everstep.trainer.data.fetcher import Microbatch
from everstep.trainer.data.rng_discovery import own_generators
from everstep.trainer.distributed.parallel import ParallelModel, Replicated
from everstep.trainer.optim import set_lr
from everstep.trainer.optimizers.alternating import turns_of
from everstep.trainer.random_state import microbatch_seed, seed_generators, seed_own
from everstep.trainer.schedule import Curve, lr_factor
from everstep.trainer.state.preserve import preserved
from everstep.trainer.state.step_passes import StepPasses
from everstep.trainer.state.train_state import TrainState
from everstep.trainer.state.trainable_copy import MOST_OBJECTS
from everstep.trainer.step_info import PendingStep, StepInfo
from everstep.trainer.step_view import Ask, StepView, view_of
from everstep.trainer.stop import Stop
from everstep.trainer.task import Loss, Task
from everstep.trainer.task_calls import TaskMetrics, float64_advice, inputs, loss_of, sparse_advice
from everstep.trainer.torchmetrics_states import drop
from everstep.trainer.update import Applied, Update
from everstep.trainer.watchdog.activity import CompiledShapes, Phase
from everstep.trainer.watchdog.device_time import ForwardTime
from everstep.trainer.whole_batch_loss import WholeBatch, WholeBatchTask

UNUSED = (
    "parallel.find_unused=false: {} got no gradient in this step on this process, and DDP waits for it; set "
    "parallel.find_unused=true for branches that only some batches take, or freeze what is never used"
)


@dataclass(frozen=True)
class StepConfig:
    """Keys of a run that determine what a step computes."""

    seed: int
    global_batch: int
    clip: float | None
    steps: int
    """Steps that the schedule spans."""
    schedule: ScheduleConfig
    curve: Curve


class Stepper:
    """Takes one step of the state per call; `results` returns the measurements, on CUDA some steps later."""

    def __init__(
        self,
        config: StepConfig,
        state: TrainState,
        parallel: ParallelModel,
        task: Task,
        stop: Stop,
        save_failed: Callable[[], bool] = lambda: False,
        recorded: Callable[[int], bool] = lambda step: True,
    ) -> None:
        """`recorded` returns True for a step whose metrics are recorded."""
        self.config = config
        self.state = state
        self.parallel = parallel
        self.task = task
        self.stop = stop
        self.save_failed = save_failed
        self.device = parallel.mesh.device
        on_cuda = self.device.type == "cuda"
        self.lag = 2 if on_cuda else 0
        """Steps after which results are read, the same on all ranks, so that no step waits for the device."""
        self.passes = StepPasses(state)
        self.update = Update(state, parallel, config.clip, config.global_batch)
        self.metrics = TaskMetrics(parallel.mesh, recorded)
        self.activity = parallel.mesh.activity
        waits = parallel.waits_forward or isinstance(task, WholeBatchTask)
        # On a GPU the host may wait in a forward pass for the device, and that for other ranks.
        self.activity.measure((Phase.data,) if on_cuda or waits else (Phase.data, Phase.forward))
        self.forward_time = None if waits else ForwardTime(self.activity, self.device, parallel.gathering)
        self.shapes = CompiledShapes(parallel.compiles)
        dtype = parallel.cast or torch.float32
        self.weight = torch.full((), 1.0 / config.global_batch, dtype=dtype, device=self.device)
        """Gradient of each loss sum: it keeps gradients small until the items of the whole batch are counted."""
        self.generators = own_generators(parallel.model, task, most=MOST_OBJECTS)
        """Generators of the model and the task themselves; seeded along with the global ones."""
        module = parallel.module
        self.searches = not isinstance(module, Replicated) or module.find_unused_parameters
        """True if a parameter may have no gradient, since no reduction waits for it."""
        self.asks: Sequence[Ask] = ()
        """Requests of the hooks."""
        self.whole = WholeBatch(task, parallel, self._seed) if isinstance(task, WholeBatchTask) else None
        self.turns = turns_of(state.optimizer)
        """Optimizer of the steps' turns; None if it does not alternate."""
        self._view: StepView | None = None
        self._pending: deque[PendingStep] = deque()

    def __call__(self, batches: Sequence[Microbatch]) -> None:
        step = self.state.progress.step + 1
        config = self.config
        set_lr(self.state.optimizer, lr_factor(step, config.steps, config.schedule, config.curve))
        self.passes.begin_step(len(batches))
        if self.asks:
            self._view = self.update.view = view_of(step, self.asks, self.parallel, self.update.share)
        sums = self._backward(step, batches)
        self.activity.at(Phase.update, step)
        applied = self._apply(sums[:4])
        self.passes.end_step(applied.skipped)
        self.state.progress.step = step
        lr = self.state.optimizer.param_groups[0]["lr"]
        self._pending.append(self._pend(step, lr, applied.facts, sums[4:]))

    def results(self, *, all_of_them: bool = False) -> list[StepInfo]:
        """Return the results that are due, oldest first; before a checkpoint or an evaluation all of them."""
        due = len(self._pending) - (0 if all_of_them else self.lag)
        return [self._pending.popleft().read() for _ in range(due)]

    def rehearse(self, batch: Mapping[str, Tensor], step: int = 1) -> int:
        """Run a step's passes on one microbatch with weight zero, reduced over ranks; return its items.

        It changes nothing: buffers, modes, plain attributes and generators are restored.
        """
        with preserved(self.parallel.model, self.task), self.parallel.gradient_sync(True):
            self._seed(0, 0)
            loss = self._loss(batch, step)
            drop(loss.metrics)
            loss.sum.backward(self.weight * 0.0)  # type: ignore[no-untyped-call]
        self._check_all_used(step)
        self.parallel.drop_gradients()
        return int(loss.count)

    def forget(self) -> None:
        """Drop outstanding results, of steps that have been rolled back."""
        self._pending.clear()

    def _apply(self, sums: Tensor) -> Applied:
        try:
            return self.update(sums)
        except RuntimeError as error:
            if advice := sparse_advice(self.parallel.model, error):
                said = f"optimizer ({type(self.state.optimizer).__name__}) fails: {' '.join(str(error).split())[:300]}"
                raise ConfigError(f"{said}; {advice}") from error
            raise

    def _backward(self, step: int, batches: Sequence[Microbatch]) -> Tensor:
        """Compute the gradients of the loss sum over `global_batch`.

        Return loss sum, items, asked and save_failed of all ranks (float64), then the sums of the task's metrics. The
        flags asked and save_failed share the all-reduce of the loss, so that all ranks agree on them without a
        collective of their own.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        loss_sum, items, asked, save_failed = sums.unbind()
        if self.stop.asked:
            asked.fill_(1.0)
        if self.save_failed():
            save_failed.fill_(1.0)
        weight = self.weight if self.state.scale is None else self.weight * self.state.scale.scale
        work = None
        self.metrics.begin(step, self._turn(step))
        if self.whole is not None:
            self.activity.at(Phase.forward, step)
            self.whole.prepare(step, batches, self.passes.rewind)
        for number, microbatch in enumerate(batches):
            last = number == len(batches) - 1
            self._seed(step, microbatch.index)
            with self.parallel.gradient_sync(last):
                self.activity.at(Phase.forward, step, number, self.shapes.is_new(microbatch.batch))
                self.passes.before_pass()
                loss = self._timed_loss(microbatch, step)
                self.passes.after_pass(microbatch.index, microbatch.real)
                if self._view is not None:
                    self._view.see(microbatch.batch)
                self.activity.at(Phase.backward, step, number)
                self.metrics.add(loss, microbatch.index, microbatch.real)
                if microbatch.real:
                    loss_sum += loss.sum.detach()
                    items += loss.count
                if last:
                    sums = self.metrics.joined(sums)
                if last and self.parallel.mesh.world > 1:
                    # It runs while the last backward pass computes.
                    work = dist.all_reduce(sums, async_op=True)
                loss.sum.backward(weight if microbatch.real else weight * 0.0)  # type: ignore[no-untyped-call]
        self._check_all_used(step)
        if work is not None:
            work.wait()
        return sums

    def _turn(self, step: int) -> str | None:
        return None if self.turns is None else self.turns.turn(step)

    def _seed(self, step: int, index: int) -> None:
        seed_generators(microbatch_seed(self.config.seed, step, index), self.device)
        if self.generators:
            seed_own(self.generators, microbatch_seed(self.config.seed, step, index))

    def _timed_loss(self, microbatch: Microbatch, step: int) -> Loss:
        if self.forward_time is None:
            return self._loss(microbatch.batch, step, microbatch.index)
        self.forward_time.start()
        loss = self._loss(microbatch.batch, step, microbatch.index)
        self.forward_time.stop()
        return loss

    def _loss(self, batch: Mapping[str, Tensor], step: int, index: int | None = None) -> Loss:
        try:
            if self.whole is not None and index is not None:
                return self.whole.loss(batch, index)
            with self.parallel.autocast():
                return loss_of(self.task, self.parallel.module, inputs(batch, self.parallel.cast), self._turn(step))
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error):
                raise ConfigError(UNUSED.format("some parameters")) from error
            if advice := float64_advice(self.parallel.model, batch, error):
                raise ConfigError(f"task.loss fails: {' '.join(str(error).split())[:300]}; {advice}") from error
            raise

    def _check_all_used(self, step: int) -> None:
        """Raise ConfigError for a missing gradient: DDP would wait for it forever, on this rank or another."""
        if self.turns is not None:
            self.turns.check_gradients(step)
        if not self.searches and self.parallel.count_gradients() < self.parallel.trained:
            missing = self.parallel.without_gradient() or ["a parameter that was frozen after the start"]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConfigError(UNUSED.format(f"{missing[0]}{more}"))

    def _pend(self, step: int, lr: float, facts: Tensor | list[float], metrics: Tensor) -> PendingStep:
        means = partial(self.metrics.values, self.metrics.states)
        if isinstance(facts, list):
            return PendingStep(step, lr, [*facts, *metrics.tolist()], None, means, self._view)
        host = torch.cat([facts, metrics]).to("cpu", non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return PendingStep(step, lr, host, ready, means, self._view)

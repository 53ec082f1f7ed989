"""Evaluation on held-out data: sums over all samples, so the result does not depend on the batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from everstep.config import EvaluateConfig, Goal, Weights
from everstep.errors import ConfigError
from everstep.trainer.data.dataset import TEST
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.loader import evaluation_batches
from everstep.trainer.distributed.parallel import ParallelModel
from everstep.trainer.optim import WeightEma, has_modes
from everstep.trainer.random_state import microbatch_seed, seed_generators
from everstep.trainer.state.preserve import preserved
from everstep.trainer.state.train_state import Progress, TrainState
from everstep.trainer.stop import Stop
from everstep.trainer.task import Task
from everstep.trainer.task_calls import checked, inputs
from everstep.trainer.torchmetrics_states import MetricStates, objects_of
from everstep.trainer.watchdog.activity import CompiledShapes

ASK_EVERY = 16
"""Microbatches between two checks whether a rank was asked to stop."""


class Evaluator:
    """Evaluates the state when it is due, and records the score in its progress."""

    def __init__(
        self,
        config: EvaluateConfig,
        state: TrainState,
        parallel: ParallelModel,
        task: Task,
        data: Mapping[str, Fetcher],
        stop: Stop,
        *,
        steps: int,
        ahead_mb: int,
    ) -> None:
        """Prepare evaluations.

        Args:
            data: the sets by name: "" if there is only one validation set, and the test set.
            steps: the steps of the run; the test set is evaluated after the last.
            ahead_mb: MB of remote data to download ahead.
        """
        self.config = config
        self.steps = steps
        self.ahead_mb = ahead_mb
        self.state = state
        self.parallel = parallel
        self.task = task
        self.data = {name: gather for name, gather in data.items() if name != TEST}
        self.test = data.get(TEST)
        self.stop = stop
        self.shapes = CompiledShapes(parallel.compiles)

    def due(self, step: int, *, last: bool) -> bool:
        """True if this step must be evaluated; also after a restart if its evaluation was interrupted."""
        if step == 0 or self.state.progress.evaluated >= step or not (self.data or (self.test and last)):
            return False
        every = self.config.every
        return last or (every is not None and step % every == 0)

    def __call__(self) -> dict[str, float] | None:
        """Return the metrics, each a mean over all held-out items; None if a rank was asked to stop meanwhile."""
        with (
            preserved(self.parallel.model, self.task),
            evaluating(self.parallel.module, self.state.optimizer),
            averaged(self.state.average if self.config.weights is Weights.ema else None),
        ):
            metrics = self._measure_all()
            if metrics is None or self.test is None or not self._is_last(metrics):
                return metrics
            tested = self._measure(self.test)
            return None if tested is None else metrics | tested.values(f"{TEST}/")

    def rehearse(self) -> None:
        """Evaluate one microbatch and discard it, so that a missing metric is an error before the first step."""
        if self.data:
            with preserved(self.parallel.model, self.task), evaluating(self.parallel.module, self.state.optimizer):
                metrics = self._measure_all(limit=self._batch() * self.parallel.mesh.world)
            if metrics is not None:
                check_metric(self.config, metrics)

    def _batch(self) -> int:
        micro_batch = self.state.progress.micro_batch
        return min(self.config.batch or micro_batch, micro_batch)

    def _is_last(self, metrics: dict[str, float]) -> bool:
        """True if training is done with this evaluation."""
        progress, patience = replace(self.state.progress), self.config.patience
        keep_score(progress, self.config, metrics)
        return progress.step >= self.steps or (patience is not None and progress.stale >= patience)

    def _measure_all(self, limit: int | None = None) -> dict[str, float] | None:
        """Return the metrics of all validation sets together, and of each by its name."""
        metrics: dict[str, float] = {}
        together = Measured({}, MetricStates(self.parallel.mesh))
        for number, (name, data) in enumerate(self.data.items()):
            found = self._measure(data, limit)
            if found is None:
                return None
            together.merge(found, number)
            if name:
                metrics |= found.values(f"{name}/")
        return together.values() | metrics

    def _measure(self, data: Fetcher, limit: int | None = None) -> Measured | None:
        """Return what a set measures; None if a rank was asked to stop meanwhile."""
        mesh, names, sums = self.parallel.mesh, ["loss"], torch.zeros(0)
        states = MetricStates(mesh)
        samples, cast = limit if limit is not None else self.config.limit, self.parallel.cast
        batches = evaluation_batches(data, self._batch(), mesh.place, mesh.device, samples, self.ahead_mb)
        for number, microbatch in enumerate(batches):
            if number % ASK_EVERY == 0 and mesh.sum(torch.tensor(float(self.stop.asked), device=mesh.device)).item():
                return None
            mesh.activity.tick(self.shapes.is_new(microbatch.batch))
            seed_generators(microbatch_seed(data.seed, 0, number * mesh.world + mesh.rank), mesh.device)
            with self.parallel.autocast():
                loss = checked(self.task.evaluate(self.parallel.module, inputs(microbatch.batch, cast)), "evaluate")
            objects = objects_of(loss.metrics)
            if objects:
                states.add(objects, microbatch.index, microbatch.real)
            summed = {name: value for name, value in loss.metrics.items() if name not in objects}
            if number == 0:
                names = ["loss", *summed]
                sums = torch.zeros(1 + len(names), dtype=torch.float64, device=mesh.device)
            if microbatch.real:
                values = [torch.as_tensor(v, device=mesh.device) for v in (loss.count, loss.sum, *summed.values())]
                sums += torch.stack([value.detach().double() for value in values])
        flag = sums.new_tensor([float(bool(states.metrics))])
        count, *totals, objects_somewhere = mesh.sum(torch.cat([sums, flag])).tolist()
        return Measured(
            {name: (total, count) for name, total in zip(names, totals, strict=True)}, states, objects_somewhere > 0
        )


@contextlib.contextmanager
def averaged(average: WeightEma | None) -> Iterator[None]:
    """Put the moving average into the model, if there is one, and the trained weights back at the end."""
    if average is None:
        yield
        return
    average.swap()
    try:
        yield
    finally:
        average.swap()


@contextlib.contextmanager
def evaluating(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the mode of each module at the end.

    An optimizer with a mode of its own (schedule-free) is switched by its `eval()` too. Switching there and back
    rounds, so the weights are copied and restored.
    """
    modes = [(inner, inner.training) for inner in module.modules()]
    switch = has_modes(optimizer)
    weights = [(p, p.detach().clone()) for g in optimizer.param_groups for p in g["params"]] if switch else []
    module.eval()
    if switch:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            yield
    finally:
        for inner, mode in modes:
            inner.training = mode
            if isinstance(inner, FSDPModule):
                # FSDP keeps the root's gathered weights after a forward pass and would use them in the next one, but
                # they are those of the moving average, or of the optimizer's eval mode.
                inner.reshard()
        if switch:
            optimizer.train()  # type: ignore[attr-defined]
            with torch.no_grad():
                for parameter, value in weights:
                    parameter.copy_(value)


@dataclass
class Measured:
    """Sum and count of each metric of a set, and the states of metric objects."""

    sums: dict[str, tuple[float, float]]
    states: MetricStates
    has_objects: bool = False
    """True if some rank has such objects."""

    def merge(self, other: Measured, number: int) -> None:
        """Add what another set measures, the n-th."""
        for metric, (total, count) in other.sums.items():
            before = self.sums.get(metric, (0.0, 0.0))
            self.sums[metric] = before[0] + total, before[1] + count
        self.states.merge(other.states, number)
        self.has_objects |= other.has_objects

    def values(self, prefix: str = "") -> dict[str, float]:
        """Return all metrics as numbers; all ranks call it."""
        objects = self.states.values() if self.has_objects else {}
        if taken := sorted(self.sums.keys() & objects.keys()):
            raise ConfigError(f"task.evaluate returned a metric {taken[0]!r}: a record has that already; rename it")
        return means(self.sums, prefix) | {f"{prefix}{name}": value for name, value in objects.items()}


def means(sums: Mapping[str, tuple[float, float]], prefix: str = "") -> dict[str, float]:
    """Return each metric divided by its items, NaN if there are none."""
    return {f"{prefix}{name}": total / count if count else float("nan") for name, (total, count) in sums.items()}


def keep_score(progress: Progress, config: EvaluateConfig, metrics: dict[str, float]) -> bool:
    """Record an evaluation in `progress`; True if its metric is the best so far."""
    if all(name.startswith(f"{TEST}/") for name in metrics):  # test metrics only: there is no metric to choose by
        progress.evaluated = progress.step
        return False
    check_metric(config, metrics)
    value = metrics[config.metric]
    gain = (
        (progress.best - value if config.goal is Goal.min else value - progress.best)
        if progress.best is not None
        else 0
    )
    better = value == value and (progress.best is None or gain > config.min_delta)
    progress.evaluated, progress.metric = progress.step, value
    progress.stale = 0 if better else progress.stale + 1
    if better:
        progress.best, progress.best_step = value, progress.step
    return better


def check_metric(config: EvaluateConfig, metrics: dict[str, float]) -> None:
    if config.metric not in metrics:
        raise ConfigError(f"evaluate.metric={config.metric!r}: the task measures {', '.join(metrics)}; choose one")

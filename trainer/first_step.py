"""One real step of one microbatch on the CPU, before a run is started: what fails in the first step fails here.

It is bounded in memory and time, since it runs on login nodes too; a model that is too large for it is passed a batch
without values instead.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.build import build_task, self_test
from trainer.config import Dtype, ParallelKind, RunConfig
from trainer.errors import ConfigError, EverstepError
from trainer.evaluate import check_metric
from trainer.generators import seed_generators
from trainer.mesh import Mesh
from trainer.model_state import check_model
from trainer.optim import build_optimizer, has_modes
from trainer.parallel import seeded
from trainer.place import Place
from trainer.sharding import parameters_on_meta
from trainer.state import Progress, TrainState
from trainer.step import UNUSED
from trainer.task import Task
from trainer.task_calls import checked, inputs

LARGEST_BYTES = 2**31
"""Weights, gradients and optimizer state of a model that is tried with values."""
LONGEST_S = 30


class TookTooLongError(Exception):
    """The step was not through in time."""


def try_first_step(
    run: RunConfig, batch: Mapping[str, Tensor], parameters: int, world: int, held_out: bool = True
) -> Sequence[str]:
    """Try the first step of a run; return notes.

    Args:
        batch: the first microbatch, on the CPU.
        parameters: of the model, counted.
        world: processes that the run will have.
        held_out: whether the run evaluates.

    Raises:
        ConfigError: something of it fails; the line says what to change.
    """
    if parameters * 16 > LARGEST_BYTES:
        return _without_values(run, batch)
    try:
        with _at_most(LONGEST_S):
            return _step(run, batch, world, held_out)
    except TookTooLongError:
        return (f"note: the first step was not through in {LONGEST_S} s on this CPU; it was not tried to its end",)


def _step(run: RunConfig, batch: Mapping[str, Tensor], world: int, held_out: bool) -> Sequence[str]:
    task, cast = build_task(run), torch.float64 if run.precision.dtype is Dtype.fp64 else None
    model = seeded(task.model, run.seed, run.precision, run.parallel)
    check_model(model)
    if run.optimizer is None:
        raise ConfigError("optimizer=null: give optimizer=NAME")
    optimizer = build_optimizer(run.optimizer, model, run.plugins)
    state = TrainState(model, optimizer, Progress(), plugins={"task": task})
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    seed_generators(run.seed)
    with _explained(model, batch, "task.loss"):
        loss = checked(task.loss(model, inputs(batch, cast)), "loss")
    with _explained(model, batch, "the backward pass of task.loss"):
        loss.sum.backward()  # type: ignore[no-untyped-call]
    notes = _look_at_gradients(run, model, world)
    with _explained(model, batch, f"optimizer ({type(optimizer).__name__})"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if run.checkpoint.self_test:
        self_test(run, task, model, Mesh(Place(), torch.device("cpu"))).round_trip(state.pack())
    if held_out:
        _try_evaluation(run, task, model, inputs(batch, cast))
    return notes


def _look_at_gradients(run: RunConfig, model: nn.Module, world: int) -> Sequence[str]:
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if not missing:
        return ()
    shown = missing[0] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    if run.parallel.kind is ParallelKind.ddp and world > 1 and not run.parallel.find_unused:
        raise ConfigError(UNUSED.format(shown))
    return (f"note: {shown} got no gradient from the first microbatch",)


def _try_evaluation(run: RunConfig, task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    model.eval()
    with torch.no_grad(), _explained(model, batch, "task.evaluate"):
        loss = checked(task.evaluate(model, batch), "evaluate")
    check_metric(run.evaluate, {"loss": 0.0, **dict.fromkeys(loss.metrics, 0.0)})


@contextlib.contextmanager
def _explained(model: nn.Module, batch: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Errors of torch and Python as a line; those that a key mends name the key."""
    try:
        yield
    except (EverstepError, TookTooLongError):
        raise
    except Exception as error:
        said = f"{where} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        doubles = [name for name, column in batch.items() if column.dtype is torch.float64]
        if doubles and not any(p.dtype is torch.float64 for p in model.parameters()) and "ouble" in str(error):
            said += (
                f"; {', '.join(doubles)} are float64 and the model's weights are not: set data.cast={{{doubles[0]}: "
                "float32}, or convert them in the dataset"
            )
        sparse = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.is_sparse]
        if sparse and "parse" in str(error):
            said += f"; {', '.join(sparse)} have sparse gradients: use SGD, Adagrad or SparseAdam, or sparse=False"
        raise ConfigError(said) from error


def _without_values(run: RunConfig, batch: Mapping[str, Tensor]) -> Sequence[str]:
    """Pass the batch to the task without a single value, which costs nothing; ConfigError for a column that lacks.

    What else fails is only noted: a model may look at values, which are not there.
    """
    task, dtype = build_task(run), torch.float64 if run.precision.dtype is Dtype.fp64 else None
    with parameters_on_meta():
        model = task.model().to("meta", dtype)
    try:
        task.loss(model, inputs({name: value.to("meta") for name, value in batch.items()}, dtype))
    except EverstepError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return (f"note: the loss of the first microbatch, tried without values, ended in {said}",)
    return ("note: the model is too large to be tried with values here; the first step was passed shapes alone",)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TookTooLongError in the main thread after some time; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TookTooLongError

    handler = signal.signal(signal.SIGALRM, stop)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, every)
        signal.signal(signal.SIGALRM, handler)

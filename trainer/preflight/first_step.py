"""Trial of a run's first step on the CPU before the run starts: forward, backward and update.

It takes one microbatch and is bounded in memory and time, since it runs on login nodes too; a model that is too large
gets a batch without values.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from everstep.config import ParallelKind, RunConfig
from everstep.errors import ConfigError, EverstepError
from everstep.rank_env import RankInfo
from everstep.trainer.build import build_task, parallel_of, self_test, trainable
from everstep.trainer.checkpoint.resume_trial import LARGEST_BYTES, try_resume
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.model_factory import batch_dtype
from everstep.trainer.distributed.sharding import parameters_on_meta
from everstep.trainer.evaluate import check_metric
from everstep.trainer.optimizers.matched import first_turn
from everstep.trainer.state.trainable_copy import Trainable
from everstep.trainer.step import UNUSED
from everstep.trainer.task import Task
from everstep.trainer.task_calls import checked, float64_advice, inputs, loss_of, sparse_advice
from everstep.trainer.torchmetrics_states import MetricStates, objects_of

LONGEST_S = 30
"""Time limit of the trial in seconds."""


class TookTooLongError(BaseException):
    """The step was not finished in time; no Exception, since the user's code may catch all of those."""


def try_first_step(
    run: RunConfig, batches: Sequence[Mapping[str, Tensor]], parameters: int, world: int, held_out: bool = True
) -> Sequence[str]:
    """Try the first step of a run; return notes.

    Args:
        batches: the first microbatches, on the CPU.
        parameters: number of the model's parameters.
        world: number of processes of the run.
        held_out: True if the run evaluates.

    Raises:
        ConfigError: the step fails; the message says what to change.
    """
    if parameters * 16 > LARGEST_BYTES:
        return _without_values(run, batches[0])
    try:
        with _at_most(LONGEST_S):
            return _step(run, batches, world, held_out)
    except TookTooLongError:
        return (f"note: the first step was not through in {LONGEST_S} s on this CPU; it was not tried to its end",)


def _step(run: RunConfig, batches: Sequence[Mapping[str, Tensor]], world: int, held_out: bool) -> Sequence[str]:
    batch = batches[0]
    cpu = torch.device("cpu")
    one = trainable(run, cpu)
    with _explained(one.model, batch, "task.loss"):
        loss = one.loss(batch, 1)
    with _explained(one.model, batch, "the backward pass of task.loss"):
        loss.sum.backward()  # type: ignore[no-untyped-call]
    notes = _look_at_gradients(run, one, world)
    with _explained(one.model, batch, f"optimizer ({type(one.optimizer).__name__})"):
        one.update(1)
    if run.checkpoint.self_test:
        self_test(run, one.task, one.model, Mesh(RankInfo(), cpu)).round_trip(one.state.pack())
        try_resume(partial(trainable, run, cpu), one.model, batches, Mesh(RankInfo(), cpu))
    if held_out:
        _try_evaluation(run, one.task, one.model, one.inputs(batch))
    return notes


def _look_at_gradients(run: RunConfig, one: Trainable, world: int) -> Sequence[str]:
    trained = {id(p) for p in one.trained(1)}
    missing = [name for name, p in one.model.named_parameters() if id(p) in trained and p.grad is None]
    if not missing:
        return ()
    shown = missing[0] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    if run.parallel.kind is ParallelKind.ddp and world > 1 and not parallel_of(run).find_unused:
        raise ConfigError(UNUSED.format(shown))
    return (f"note: {shown} got no gradient from the first microbatch",)


def _try_evaluation(run: RunConfig, task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    model.eval()
    with torch.no_grad(), _explained(model, batch, "task.evaluate"):
        loss = checked(task.evaluate(model, batch), "evaluate")
    objects = objects_of(loss.metrics)
    states = MetricStates(Mesh(RankInfo(), torch.device("cpu")))
    states.add(objects, 0, real=True)
    summed = dict.fromkeys(loss.metrics.keys() - objects.keys(), 0.0)
    check_metric(run.evaluate, {"loss": 0.0, **summed, **states.values()})


@contextlib.contextmanager
def _explained(model: nn.Module, batch: Mapping[str, Tensor], where: str) -> Iterator[None]:
    """Raise errors of torch and Python as a ConfigError of one line, with the key to change if known."""
    try:
        yield
    except EverstepError:
        raise
    except Exception as error:
        said = f"{where} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        advice = float64_advice(model, batch, error) or sparse_advice(model, error)
        raise ConfigError(f"{said}; {advice}" if advice else said) from error


def _without_values(run: RunConfig, batch: Mapping[str, Tensor]) -> Sequence[str]:
    """Pass the batch to the task on the meta device, which takes no memory and no time.

    Raise ConfigError for a missing column. Any other error becomes a note, since a model may read values, and there are
    none.
    """
    task, dtype = build_task(run), batch_dtype(run.precision)
    with parameters_on_meta():
        model = task.model().to("meta", dtype)
    try:
        loss_of(task, model, inputs({name: value.to("meta") for name, value in batch.items()}, dtype), first_turn(run))
    except EverstepError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return (f"note: the loss of the first microbatch, tried without values, ended in {said}",)
    return ("note: the model is too large to be tried with values here; the first step was passed shapes alone",)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TookTooLongError in the main thread after a time; other threads have no limit."""
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

"""Trial of a resume in memory, before the first step of a run.

A copy that is restored from a saved state must train as the original does. The trial finds state that is neither in a
`state_dict()` nor in a plain attribute: in objects, closures and globals.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError, EverstepError
from everstep.fault import fault_of, reason_of
from everstep.outcome import Fault
from everstep.trainer.checkpoint.self_test import OFF, equal, first_difference, put_into
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.random_state import generators_preserved
from everstep.trainer.state.attributes import NOT_STATE, PREFIX, STRUCTURE
from everstep.trainer.state.train_state import Packed
from everstep.trainer.state.trainable_copy import Trainable
from everstep.trainer.task_calls import sparse_advice

LOG = logging.getLogger("everstep")
LARGEST_BYTES = 2**31
"""Size of weights, gradients and optimizer state up to which a model is tried."""
SLOWEST_S = 2.0
"""Time of a first step up to which a trial goes on; it takes eight."""
SAVED_AFTER, LAST = 2, 4
"""Steps after which the original is saved, and until which both train."""
MOST_NAMED = 3
"""Attributes that an error lists."""
STATE_DICT = "give the model get_extra_state() and set_extra_state(), or the task state_dict() and load_state_dict()"
Make = Callable[[Iterable[nn.Module]], Trainable]
"""Makes a new copy; its argument are the models with which it may have nothing in common."""


def try_resume(make: Make, live: nn.Module, batches: Sequence[Mapping[str, Tensor]], mesh: Mesh) -> None:
    """Train a copy, save it, restore another, and compare the next steps of both.

    A large or slow model is not tried.

    Args:
        live: the run's own model, which is left as it is.
        batches: microbatches on the run's device, the same on all ranks, one a step.

    Raises:
        ConfigError: on all ranks, if the two differ on one; the line names the attributes that are not saved.
    """
    if sum(parameter.numel() for parameter in live.parameters()) * 16 > LARGEST_BYTES:
        LOG.info("a resume was not tried before the first step: the model is larger than %d bytes", LARGEST_BYTES)
        return
    with generators_preserved():
        trial = _Trial(make, live, batches, mesh)
        problem = trial.problem()
    for found, refused in mesh.gather([problem, trial.refused]):
        if found:
            raise ConfigError(f"self-test: {found}" if refused else f"self-test: {found}; {OFF}")


class _Trial:
    def __init__(self, make: Make, live: nn.Module, batches: Sequence[Mapping[str, Tensor]], mesh: Mesh) -> None:
        self.make, self.live, self.batches, self.mesh = make, live, batches, mesh
        self.refused = False
        """True if the run would end with the same ConfigError without a trial."""

    def problem(self) -> str | None:
        """Return what a resume would change, or None."""
        original, took_s = self._begun()
        if max(self.mesh.gather(took_s)) > SLOWEST_S:
            LOG.info("a resume was not tried before the first step: a step takes more than %g s", SLOWEST_S)
            return None
        assert original is not None
        if untrained := _learnt_outside(original):
            return (
                f"{untrained} gets a gradient and no optimizer trains it: put it into the model that task.model() "
                "returns, or compute it without gradients"
            )
        try:
            original.train(self.batches, 2, SAVED_AFTER)
            saved = _copied(original.state.pack())
            original.train(self.batches, SAVED_AFTER + 1, LAST)
        except Exception as error:
            self.refused = isinstance(error, ConfigError)
            return _later_step_fails(original, error)
        try:
            resumed = self._resumed(saved, original)
            if _differences(original, resumed) == (None, None):
                return None
            again = self._resumed(saved, original, resumed)
            return self._judge(original, resumed, again)
        except Exception as error:
            if fault_of(error) is Fault.machine:
                _left_to_the_run(error)
                return None
            return f"a step after a resume fails with {reason_of(error)}, and would not without one; {STATE_DICT}"

    def _judge(self, original: Trainable, resumed: Trainable, again: Trainable) -> str | None:
        """Return what differs because of a resume, and not each time that the same steps are taken."""
        (trained, kept), (unstable, changing) = _differences(original, resumed), _differences(resumed, again)
        if unstable is not None:
            return self._not_reproducible(unstable)
        # Attributes that differ each time, such as seconds that a task measures, change nothing that is trained.
        name = trained or (kept if changing is None else None)
        if name is None:
            return None
        return f"after a resume {name} would be another than without one, because of {_causes(original, resumed)}"

    def _begun(self) -> tuple[Trainable | None, float]:
        """Return the original after its first step, and the seconds of that step; infinite if it failed."""
        try:
            original = self.make([self.live])
            began = time.monotonic()
            original.train(self.batches, 1, 1)
            return original, time.monotonic() - began
        except Exception as error:
            _left_to_the_run(error)
            return None, math.inf

    def _resumed(self, saved: Packed, *others: Trainable) -> Trainable:
        copy = self.make([self.live, *(other.model for other in others)])
        with torch.no_grad():
            put_into(copy.state, saved)
        copy.train(self.batches, SAVED_AFTER + 1, LAST)
        return copy

    def _not_reproducible(self, name: str) -> str | None:
        if self.mesh.device.type == "cuda":  # whose kernels may add in any order
            LOG.info("a resume cannot be tried: %s is another at each pass on this device", name)
            return None
        return (
            f"{name} is another each time that the same steps are taken from the same state: the model or the task "
            "takes something from outside, such as the time, a global variable, a file or a generator without a seed"
        )


def _learnt_outside(one: Trainable) -> str | None:
    """Return the name of a parameter that the task keeps and that got a gradient, but is not in the model."""
    own = {id(parameter) for parameter in one.model.parameters()}
    kept = {"task": one.task, **{f"task.{key}": value for key, value in getattr(one.task, "__dict__", {}).items()}}
    for path, thing in kept.items():
        if isinstance(thing, nn.Parameter):
            named = [("", thing)]
        else:
            named = [*thing.named_parameters()] if isinstance(thing, nn.Module) else []
        for name, parameter in named:
            if parameter.grad is not None and id(parameter) not in own:
                return f"{path}.{name}" if name else path
    return None


def _later_step_fails(original: Trainable, error: Exception) -> str | None:
    if fault_of(error) is Fault.machine:
        _left_to_the_run(error)
        return None
    advice = sparse_advice(original.model, error)
    said = str(error) if isinstance(error, EverstepError) else reason_of(error)
    return f"a later step fails: {said}" + (f"; {advice}" if advice else "")


def _left_to_the_run(error: Exception) -> None:
    """Leave an error of the trial's own steps to the run's first step, which reports it with its place."""
    LOG.info("a resume was not tried before the first step: %s", reason_of(error))


def _copied(packed: Packed) -> Packed:
    tensors = {name: tensor.detach().clone() for name, tensor in packed.tensors.items()}
    return Packed(tensors, json.loads(json.dumps(packed.values)))


def _differences(one: Trainable, other: Trainable) -> tuple[str | None, str | None]:
    """Return the first difference of two copies after the same steps: in what is trained, in attributes."""
    mine, theirs = one.state.pack(), other.state.pack()
    both = mine.tensors.keys() & theirs.tensors.keys()
    found: list[str | None] = [
        name
        for name in sorted(mine.tensors.keys() | theirs.tensors.keys())
        if name not in both or not equal(mine.tensors[name], theirs.tensors[name])
    ]
    found += [
        first_difference(mine.values.get(part), theirs.values.get(part), part)
        for part in sorted(mine.values.keys() | theirs.values.keys())
    ]
    trained = next((name for name in found if name and not name.startswith(PREFIX)), None)
    if not equal(one.last_loss, other.last_loss):
        trained = f"the loss of step {LAST} ({float(one.last_loss):.6g}, not {float(other.last_loss):.6g})"
    return trained, next((name for name in found if name and name.startswith(PREFIX)), None)


def _causes(one: Trainable, other: Trainable) -> str:
    """Return the attributes whose values differ between two copies, and what to do about them."""
    saved = one.state.pack().values.get("attributes", {})
    unsaved = {name: kind for name, kind in _differing(one, other) if name not in saved}
    found = [f"{name} ({kind})" for name, kind in unsaved.items()][:MOST_NAMED]
    if not found:
        return "a closure or a global variable, which a checkpoint does not hold: make it a buffer or a plain attribute"
    of_optimizer = all(name.startswith("optimizer.") for name in found)
    advice = "keep it in self.state or in param_groups" if of_optimizer else STATE_DICT
    return f"{', '.join(found)}, which a checkpoint does not hold: {advice}"


def _differing(one: Trainable, other: Trainable) -> Iterator[tuple[str, str]]:
    """Yield the name and type of each attribute whose value differs between two copies."""
    inner = dict(other.model.named_modules())
    for name, module in one.model.named_modules():
        yield from _differing_attributes(f"model.{name}" if name else "model", module, inner.get(name), STRUCTURE)
    # A task that keeps its model differs wherever the model does, so the model is left out.
    models = frozenset(key for key, value in getattr(one.task, "__dict__", {}).items() if value is one.model)
    yield from _differing_attributes("task", one.task, other.task, models)
    yield from _differing_attributes("optimizer", one.optimizer, other.optimizer, NOT_STATE)


def _differing_attributes(path: str, one: object, other: object, left_out: frozenset[str]) -> Iterator[tuple[str, str]]:
    mine, theirs = getattr(one, "__dict__", {}), getattr(other, "__dict__", {})
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in left_out and _bytes_of(mine.get(key)) != _bytes_of(theirs.get(key)):
            yield f"{path}.{key}", type(mine.get(key)).__name__


def _bytes_of(value: Any) -> bytes | None:
    """Return an object as bytes; None for one that has none, such as a function or an open file."""
    try:
        return pickle.dumps(value.state_dict() if isinstance(value, nn.Module) else value)
    except Exception:  # the classes of users raise what they like
        return None

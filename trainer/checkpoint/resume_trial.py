"""Trial of a resume, in memory, before a run's first step.

A copy restored from a saved state must train on exactly as the original does. This finds state that is neither in a
`state_dict()` nor in a plain attribute: in objects, closures and globals.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.fault import fault_of, reason_of
from everstep.run_folder import Fault
from everstep.trainer.checkpoint.self_test import OFF, equal, first_difference, put_into
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.random_state import generators_preserved
from everstep.trainer.state.attributes import STRUCTURE
from everstep.trainer.state.train_state import Packed
from everstep.trainer.state.trainable import Trainable

LOG = logging.getLogger("everstep")
LARGEST_BYTES = 2**31
"""Largest size of weights, gradients and optimizer state for which the trial runs."""
SLOWEST_S = 2.0
"""Longest first step, in seconds, for which the trial continues; it takes eight steps."""
SAVED_AFTER, LAST = 2, 4
"""Step after which the original is saved, and the last step that both train."""
STATE_DICT = "give the model get_extra_state() and set_extra_state(), or the task state_dict() and load_state_dict()"
Make = Callable[[Iterable[nn.Module]], Trainable]
"""Factory of a new copy; its argument is the models with which it must share nothing."""


def try_resume(make: Make, live: nn.Module, batch: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Train a copy, save it, restore it into another one, and compare the next steps of both.

    A large or slow model is not tried.

    Args:
        live: the run's own model, which is not changed.
        batch: a microbatch on the run's device, the same on all ranks.

    Raises:
        ConfigError: on all ranks, if the two differ on one; the message names the attributes that are not saved.
    """
    if sum(parameter.numel() for parameter in live.parameters()) * 16 > LARGEST_BYTES:
        return
    with generators_preserved():
        problem = _Trial(make, live, batch, mesh).problem()
    for found in mesh.gather(problem):
        if found:
            raise ConfigError(f"self-test: {found}; {OFF}")


class _Trial:
    def __init__(self, make: Make, live: nn.Module, batch: Mapping[str, Tensor], mesh: Mesh) -> None:
        self.make, self.live, self.batch, self.mesh = make, live, batch, mesh

    def problem(self) -> str | None:
        """Return the first difference that a resume would make, or None."""
        original, took_s = self._begun()
        if max(self.mesh.gather(took_s)) > SLOWEST_S:
            return None
        assert original is not None
        try:
            original.train(self.batch, 2, SAVED_AFTER)
            saved = _copied(original.state.pack())
            original.train(self.batch, SAVED_AFTER + 1, LAST)
        except Exception as error:
            return _left_to_the_run(error)
        try:
            resumed = self._resumed(saved, original)
            if (name := _difference(original, resumed)) is None:
                return None
            if (again := _difference(resumed, self._resumed(saved, original, resumed))) is not None:
                return self._not_reproducible(again)
        except Exception as error:
            if fault_of(error) is Fault.machine:
                return _left_to_the_run(error)
            return f"a step after a resume fails with {reason_of(error)}, and would not without one; {STATE_DICT}"
        return f"after a resume {name} would be another than without one, because of {_causes(original, resumed)}"

    def _begun(self) -> tuple[Trainable | None, float]:
        """Return the original after its first step, and the seconds that the step took.

        If the step failed, return None and infinity.
        """
        try:
            original = self.make([self.live])
            began = time.monotonic()
            original.train(self.batch, 1, 1)
            return original, time.monotonic() - began
        except Exception as error:
            _left_to_the_run(error)
            return None, math.inf

    def _resumed(self, saved: Packed, *others: Trainable) -> Trainable:
        copy = self.make([self.live, *(other.model for other in others)])
        with torch.no_grad():
            put_into(copy.state, saved)
        copy.train(self.batch, SAVED_AFTER + 1, LAST)
        return copy

    def _not_reproducible(self, name: str) -> str | None:
        if self.mesh.device.type == "cuda":  # CUDA kernels may add in any order
            return None
        return (
            f"{name} is another each time that the same steps are taken from the same state: the model or the task "
            "takes something from outside, such as the time, a global variable, a file or a generator without a seed"
        )


def _left_to_the_run(error: Exception) -> None:
    """Leave an error of the trial's steps to the run's first step, which reports it with its location."""
    LOG.debug("a resume was not tried: %s", reason_of(error))


def _copied(packed: Packed) -> Packed:
    tensors = {name: tensor.detach().clone() for name, tensor in packed.tensors.items()}
    return Packed(tensors, json.loads(json.dumps(packed.values)))


def _difference(one: Trainable, other: Trainable) -> str | None:
    """Return the first difference of two copies after the same steps: the loss, or a part of the state."""
    if not equal(one.last_loss, other.last_loss):
        return f"the loss of step {LAST} ({float(one.last_loss):.6g}, not {float(other.last_loss):.6g})"
    mine, theirs = one.state.pack(), other.state.pack()
    for name in sorted(mine.tensors.keys() | theirs.tensors.keys()):
        if not all(name in packed.tensors for packed in (mine, theirs)) or not equal(
            mine.tensors[name], theirs.tensors[name]
        ):
            return name
    if mine.values != theirs.values:
        return first_difference(mine.values, theirs.values, "state")
    return None


def _causes(one: Trainable, other: Trainable) -> str:
    """Return the attributes whose values differ between two copies, or other possible causes."""
    found = list(dict.fromkeys(_differing(one, other)))[:3]
    if found:
        return f"{', '.join(found)}, which a checkpoint does not hold: {STATE_DICT}"
    return "a closure or a global variable, which a checkpoint does not hold: make it a buffer or an attribute"


def _differing(one: Trainable, other: Trainable) -> Iterator[str]:
    inner = dict(other.model.named_modules())
    pairs = [
        (f"model.{name}" if name else "model", module, inner.get(name)) for name, module in one.model.named_modules()
    ]
    pairs += [("task", one.task, other.task), ("optimizer", one.optimizer, other.optimizer)]
    for path, mine, theirs in pairs:
        for key, value in getattr(mine, "__dict__", {}).items():
            if key not in STRUCTURE and _bytes_of(value) != _bytes_of(getattr(theirs, "__dict__", {}).get(key)):
                yield f"{path}.{key} ({type(value).__name__})"


def _bytes_of(value: Any) -> bytes | None:
    """Return an object as bytes for a comparison; None for one that cannot be pickled."""
    try:
        return pickle.dumps(value)
    except Exception:  # a user's class may raise any exception
        return None

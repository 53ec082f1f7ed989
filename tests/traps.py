"""Ways to die at a chosen place: each lays a trap in a forked rank, at one of the named points of a run's life."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from trainer.checkpoint.dcp_io import Writer
from trainer.evaluate import Evaluator
from trainer.run_folder import MANIFEST
from trainer.step import Stepper
from trainer.storage import LocalStorage

Trap = Callable[[int], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, method: str, sprung: Callable[..., bool]) -> None:
    """Die as `method` is called, when `sprung` says of its arguments that this is the call."""
    original = getattr(owner, method)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        if sprung(*args):
            die()
        return original(*args, **kwargs)

    setattr(owner, method, trapped)


def after(owner: type, method: str, sprung: Callable[..., bool]) -> None:
    """Die when the call is through."""
    original = getattr(owner, method)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if sprung(*args):
            die()
        return result

    setattr(owner, method, trapped)


def count_to(number: int) -> Callable[..., bool]:
    """True at the `number`-th call (1 is the first)."""
    calls = iter(range(1, 10**6))
    return lambda *_: next(calls) == number


def at_step(step: int) -> None:
    before(Stepper, "__call__", lambda self, _: self.state.progress.step + 1 == step)


def in_step(step: int) -> None:
    """Between the gradients and the update."""
    before(Stepper, "_update", lambda self, _: self.state.progress.step + 1 == step)


def in_save(number: int) -> None:
    """As the bytes of the `number`-th checkpoint are about to be written."""
    before(Writer, "_write", count_to(number))


def after_write(number: int) -> None:
    """The bytes are there, the other ranks do not know it yet."""
    after(Writer, "_write", count_to(number))


def before_commit(number: int) -> None:
    before(LocalStorage, "create", _manifests(number))


def after_commit(number: int) -> None:
    after(LocalStorage, "create", _manifests(number))


def _manifests(number: int) -> Callable[..., bool]:
    count = count_to(number)
    return lambda self, path, data: path.endswith(MANIFEST) and count()


def in_retention(number: int) -> None:
    """A manifest was removed, its files are still there."""
    after(LocalStorage, "delete", count_to(number))


def in_evaluation(number: int) -> None:
    before(Evaluator, "__call__", count_to(number))


def after_evaluation(number: int) -> None:
    after(Evaluator, "__call__", count_to(number))

"""Ways to die at a chosen place: each lays a trap in a forked rank, at one of the named points of a run's life."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import IO, Any

from everstep.run_folder import MANIFEST
from everstep.storage import LocalStorage
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import TENSORS
from everstep.trainer.checkpoint.pending_save import SaveCoordinator
from everstep.trainer.checkpoint.run_folder_target import RunFolderTarget
from everstep.trainer.checkpoint.staging import Staging
from everstep.trainer.evaluate import Evaluator
from everstep.trainer.step import Stepper
from everstep.trainer.update import Update

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
    before(Update, "__call__", lambda self, _: self.state.progress.step + 1 == step)


# ------------------------------------------------------- from "save called" to "old one removed", in this order


def before_save(number: int) -> None:
    before(Checkpointer, "save", count_to(number))


def before_copy(number: int) -> None:
    before(Staging, "fill", count_to(number))


def after_copy(number: int) -> None:
    """The state is copied, nothing of it is written."""
    after(Staging, "fill", count_to(number))


def before_write(number: int) -> None:
    """Beside training, as the bytes of the `number`-th checkpoint are about to be written."""
    before(RunFolderTarget, "write", count_to(number))


def in_write(number: int) -> None:
    """Some of the bytes are written."""
    original, count = LocalStorage.writer, count_to(number)

    @contextlib.contextmanager
    def trapped(self: LocalStorage, path: str) -> Iterator[Any]:
        with original(self, path) as file:
            yield Torn(file) if path.endswith(".tensors") and count() else file

    LocalStorage.writer = trapped  # type: ignore[method-assign]


class Torn:
    """A file that takes half of the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def write(self, data: memoryview) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        die()


def after_write(number: int) -> None:
    """The bytes are there, the other ranks do not know it yet."""
    after(RunFolderTarget, "write", count_to(number))


def after_report(number: int) -> None:
    """Rank 0 can know that this rank's bytes are there."""
    after(SaveCoordinator, "report", count_to(number))


def after_collect(number: int) -> None:
    """Rank 0 knows that all bytes are there."""
    after(SaveCoordinator, "collect", count_to(number))


def after_table(number: int) -> None:
    count = count_to(number)
    after(LocalStorage, "write", lambda self, path, data: path.endswith(TENSORS) and count())


def before_commit(number: int) -> None:
    before(LocalStorage, "create", _manifests(number))


def after_commit(number: int) -> None:
    after(LocalStorage, "create", _manifests(number))


def _manifests(number: int) -> Callable[..., bool]:
    count = count_to(number)
    return lambda self, path, data: path.endswith(MANIFEST) and count()


def in_retention(number: int) -> None:
    """A manifest was removed, its files are still there."""
    count = count_to(number)
    after(LocalStorage, "delete", lambda self, path: path.endswith(MANIFEST) and count())


def after_retention(number: int) -> None:
    count = count_to(number)
    after(LocalStorage, "delete", lambda self, path: "checkpoints/step" in path and "." not in path and count())


def before_announce(number: int) -> None:
    """It is committed, the other ranks do not know it yet."""
    before(SaveCoordinator, "announce", count_to(number))


def after_announce(number: int) -> None:
    after(SaveCoordinator, "announce", count_to(number))


def after_result(number: int) -> None:
    after(SaveCoordinator, "await_result", count_to(number))


SAVE_POINTS: dict[str, tuple[Callable[[int], None], int, tuple[int, ...]]] = {
    # name: how to die there, how often a run of three checkpoints comes by, which of two ranks come by
    "as a save is called": (before_save, 3, (0, 1)),
    "before the copy": (before_copy, 3, (0, 1)),
    "after the copy": (after_copy, 3, (0, 1)),
    "before the bytes are written": (before_write, 3, (0, 1)),
    "with half of the bytes written": (in_write, 3, (0, 1)),
    "with its bytes written": (after_write, 3, (0, 1)),
    "when rank 0 could know": (after_report, 3, (0, 1)),
    "when rank 0 knows of all": (after_collect, 3, (0,)),
    "with the table written": (after_table, 3, (0,)),
    "before the commit": (before_commit, 3, (0,)),
    "after the commit": (after_commit, 3, (0,)),
    "with an old manifest removed": (in_retention, 1, (0,)),
    "with an old one removed": (after_retention, 1, (0,)),
    "before the others know": (before_announce, 3, (0,)),
    "when the others could know": (after_announce, 3, (0,)),
    "when another knows": (after_result, 3, (1,)),
}
"""Every point of a save at which something has changed for whoever comes after."""


def in_evaluation(number: int) -> None:
    before(Evaluator, "__call__", count_to(number))


def after_evaluation(number: int) -> None:
    after(Evaluator, "__call__", count_to(number))

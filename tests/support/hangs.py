"""Ways to hang in the middle of a step: each is what a rank of the toy does in one of its passes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from support import toy


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loop() -> None:
    while True:
        pass


def sleep() -> None:
    time.sleep(10**6)


def hold_lock_busy() -> None:
    sum(range(10**13))


def hold_lock_blocked() -> None:
    while True:  # a signal ends a sleep
        ctypes.PyDLL(None).sleep(10**6)


def join_alone() -> None:
    """Enter a collective that no other rank enters."""
    dist.barrier()


def now_and_then(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def in_pass(number: int, act: Callable[[], None], ranks: Collection[int] = (1,), method: str = "loss"
            ) -> Callable[[int], None]:  # fmt: skip
    """A trap: `act` as the task's `number`-th pass begins on each of these ranks, 1 being the rehearsal's."""

    def lay(rank: int) -> None:
        if rank in ranks:
            before(toy.ToyTask, method, number, act)

    return lay


def before(owner: Any, method: str, number: int, act: Callable[[], None]) -> None:
    original, calls = getattr(owner, method), iter(range(1, 10**9))

    def trapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, method, trapped)


class Passes:
    """The number of passes so far: in an object, since attributes are set back before each pass of a step."""

    taken = 0


class HangingTask(toy.ToyTask):
    """The toy, of which one rank hangs in a pass, the first time only; `how` is the name of a function here."""

    def __init__(self, rank: int, number: int, once: str, how: str = "stop", **options: Any) -> None:
        super().__init__(**options)
        self.how = how
        self.trap = (os.environ.get("RANK", "0") == str(rank), number, once)
        self.passes = Passes()

    def loss(self, model: Any, batch: Any) -> Any:
        self.passes.taken += 1
        mine, number, once = self.trap
        if mine and self.passes.taken == number and not os.path.exists(once):
            Path(once).touch()
            globals()[self.how]()
        return super().loss(model, batch)


def print_without_reader() -> None:
    """Print into a pipe that is full and that nobody reads: the lock of the stream is held from then on."""
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.dup2(reading, 0)  # else it would be closed, and the print would fail
    while True:
        print("x" * 4096, file=sys.stderr, flush=True)

"""Activity of a rank: the place in its run, written by the main thread and read by the watchdog."""

from __future__ import annotations

import enum
import mmap
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple


class Phase(enum.IntEnum):
    """Phase of a run. The numbers are the order in which one step passes through them."""

    build = 0
    restore = 1
    rehearse = 2
    data = 3
    """Waits for the microbatches of the step."""
    forward = 4
    backward = 5
    """Backward pass, or the reduction of gradients that it waits for."""
    update = 6
    hook = 7
    rollback = 8
    evaluate = 9
    save = 10
    end = 11


PATIENT = frozenset({Phase.build, Phase.restore, Phase.rehearse, Phase.rollback, Phase.end})
"""Phases that may always take long: they move the whole state, with deadlines of their own."""


class Mark(NamedTuple):
    """Place at which the main thread was last seen."""

    phase: Phase
    step: int
    turn: int
    """Number of the microbatch, or of the check of a save that is waited for."""
    since: float
    """Time of the mark by the monotonic clock."""
    fresh: bool
    """True if the phase is passed for the first time: compilers, tuners and caches are at work."""


if TYPE_CHECKING:
    from everstep.trainer.watchdog.straggler import Straggler

PAGE = struct.Struct("<iqqd")
"""Phase, step, turn and time of a mark, as other processes of the node read it."""


class Activity:
    """The newest mark of this process.

    A mark is one assignment of a tuple, so that another thread reads it whole without a lock, and a step can afford
    several: they cost about a microsecond each.
    """

    def __init__(self) -> None:
        self._seen: set[object] = set()
        self._page: mmap.mmap | None = None
        self.mark = Mark(Phase.build, 0, 0, time.monotonic(), True)
        self.own_s = 0.0
        """Seconds so far in which this rank fetched data and passed forward, and waited for no other."""
        self.passes = 0
        """Forward passes so far; 0 where they wait for other ranks, so that their times tell nothing."""
        self.waited_s = 0.0
        """Seconds since the last mark in which this rank waited for others; they are not its own."""
        self._own: tuple[Phase, ...] = ()
        self.stragglers: deque[Straggler | None] = deque(maxlen=8)
        """News of stragglers, which the training loop reports: the one found, or None when it is gone."""

    def at(self, phase: Phase, step: int, turn: int = 0, fresh: bool = False) -> None:
        """Mark the place that the main thread comes to.

        Args:
            fresh: this pass does something for the first time, such as compiling for a new shape.
        """
        now, last = time.monotonic(), self.mark
        if self._own:
            if last[0] in self._own:
                self.own_s += now - last[3] - self.waited_s
            self.waited_s = 0.0
            self.passes += last[0] is Phase.forward
        if phase not in self._seen:
            self._seen.add(phase)
            fresh = True
        self.mark = Mark(phase, step, turn, now, fresh)
        if self._page is not None:
            PAGE.pack_into(self._page, 0, phase, step, turn, now)

    def measure(self, own: tuple[Phase, ...]) -> None:
        """Add up the time in these phases from now on: a rank waits there for another in `waited_s` alone."""
        self._own = own

    def share(self) -> int:
        """Copy each mark to memory that other processes of this node can read; return its descriptor, or -1.

        A frozen process sends no more heartbeats, and its last one may be some steps old.
        """
        if sys.platform != "linux":
            return -1
        descriptor = os.memfd_create("everstep-activity")
        os.ftruncate(descriptor, PAGE.size)
        self._page = mmap.mmap(descriptor, PAGE.size)
        PAGE.pack_into(self._page, 0, *self.mark[:4])
        return descriptor

    def tick(self, fresh: bool = False) -> None:
        """Mark progress within the present phase."""
        phase, step, turn = self.mark[:3]
        if ("tick", phase) not in self._seen:
            self._seen.add(("tick", phase))
            fresh = True
        self.at(phase, step, turn + 1, fresh)


class CompiledShapes:
    """Shapes of batches that a compiled model has met; for each new one it is compiled again."""

    def __init__(self, compiles: bool) -> None:
        self._met: set[tuple[tuple[int, ...], ...]] | None = set() if compiles else None

    def is_new(self, batch: Mapping[str, Any]) -> bool:
        """True the first time that a model which is compiled meets these shapes."""
        if self._met is None:
            return False
        shapes = tuple(tuple(tensor.shape) for tensor in batch.values())
        if shapes in self._met:
            return False
        self._met.add(shapes)
        return True

"""Time of forward passes without what they wait for other ranks, measured without a wait for a device.

A unit of FSDP gathers its parameters before its forward pass, and that waits for the slowest rank. What remains of a
pass without the time in these gathers is the rank's own work. On a GPU events mark both, which the device passes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from everstep.trainer.watchdog.activity import Activity

SHARDED_EVERY = 7
"""One in so many passes of a sharded model is measured on a GPU; prime: no fixed place in the steps."""


class ForwardTime:
    """Time of forward passes, for the activity; on a CPU the activity measures all but the gathers itself."""

    def __init__(self, activity: Activity, device: torch.device, units: Iterable[nn.Module] = ()) -> None:
        """`units` gather their parameters in a hook before their forward pass."""
        self.activity = activity
        self._on_cuda = device.type == "cuda"
        self._open: deque[list[torch.cuda.Event]] = deque()
        self._pass: list[torch.cuda.Event] | None = None
        """Events of the present pass: begin and end of each stretch without a gather."""
        self._passes = 0
        self._every = 1
        self._gather_began = 0.0
        for unit in units:
            self._every = SHARDED_EVERY
            # The hook of FSDP was put first; these run before and after it.
            unit.register_forward_pre_hook(self._before_gather, prepend=True)
            unit.register_forward_pre_hook(self._after_gather)

    def start(self) -> None:
        if self._on_cuda:
            self._pass = [_event()] if self._passes % self._every == 0 else None
            self._passes += 1

    def stop(self) -> None:
        """Mark the end of the pass; account for those that the device has finished."""
        if self._pass is not None:
            self._open.append([*self._pass, _event()])
            self._pass = None
        while self._open and self._open[0][-1].query():  # type: ignore[no-untyped-call]
            events = self._open.popleft()
            own_ms = sum(begin.elapsed_time(end) for begin, end in zip(events[::2], events[1::2], strict=True))
            self.activity.own_s += self._every * own_ms / 1000

    def _before_gather(self, module: nn.Module, args: Any) -> None:
        if self._on_cuda:
            self._mark()
        else:
            self._gather_began = time.monotonic()

    def _after_gather(self, module: nn.Module, args: Any) -> None:
        if self._on_cuda:
            self._mark()
        else:
            self.activity.waited_s += time.monotonic() - self._gather_began

    def _mark(self) -> None:
        """Mark the end, or the beginning, of a stretch; forward passes of an evaluation are not measured."""
        if self._pass is not None:
            self._pass.append(_event())


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event

"""Time that forward passes take on a GPU, measured without waiting for it."""

from __future__ import annotations

from collections import deque

import torch

from everstep.trainer.watchdog.activity import Activity


class ForwardTime:
    """Time of forward passes on a device, for the activity; on a CPU the activity measures it itself."""

    def __init__(self, activity: Activity, device: torch.device) -> None:
        self.activity = activity
        self._on_cuda = device.type == "cuda"
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        if self._on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            self._open.append((begin, end))

    def stop(self) -> None:
        """Mark the end of the pass; account for those that the device has finished."""
        if not self._on_cuda:
            return
        self._open[-1][1].record()
        while self._open and self._open[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._open.popleft()
            self.activity.own_s += begin.elapsed_time(end) / 1000

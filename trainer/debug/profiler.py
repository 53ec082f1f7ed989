"""Profile of some steps: a trace for Perfetto and a table, from the start or of a run that is going already."""

from __future__ import annotations

import gzip
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from everstep.config import DebugConfig, StopConfig
from everstep.errors import EverstepError
from everstep.run_folder import RunFolder, profile_request
from everstep.trainer.reporting.sinks import warn

WARM_UP = 2
"""Steps of a run before those that its config asks to profile."""
DEAREST = 10
"""Operators in the table."""
MOST_STEPS = 1000


class StepProfiler:
    """Profiler of one rank; while nothing is asked of it, a step reads one attribute."""

    def __init__(self, config: DebugConfig, stop: StopConfig, folder: RunFolder, attempt: int, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.attempt = attempt
        self.active = config.profile is not None
        self._steps = config.profile or 0
        self._wait = WARM_UP if self.active else 0
        self._profile: Any = None
        self._done = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        # On a disk to look costs nothing; in a store only rank 0 looks, as requests cost money there.
        if folder.storage.path() is not None or rank == 0:
            self._thread = threading.Thread(target=self._poll, args=(stop.poll_s,), daemon=True)
            self._thread.start()

    def before_step(self, step: int) -> None:
        """Begin, go on with or end the profile; called before `step` while active."""
        if self._wait:
            self._wait -= 1
            return
        if self._profile is None:
            self._profile, self._done = _profiler(), 0
            self._profile.start()
        elif self._done == self._steps:
            self._finish(step - 1)
            return
        self._done += 1

    def close(self, step: int) -> None:
        self._closed.set()
        if self._profile is not None:
            self._finish(step)

    def _finish(self, step: int) -> None:
        found, self._profile, self.active = self._profile, None, False
        found.stop()
        base = self.folder.attempt(self.attempt, f"profile-rank-{self.rank:04d}-step-{step:08d}")
        try:
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch, "trace.json")
                found.export_chrome_trace(str(file))
                self.folder.storage.write(f"{base}.trace.json.gz", gzip.compress(file.read_bytes(), 5))
            self.folder.storage.write(f"{base}.txt", table(found).encode())
        except (EverstepError, OSError) as error:
            warn(f"the profile up to step {step} could not be written: {error}")
            return
        print(f"{table(found)}\ntrace of {self._done} steps for https://ui.perfetto.dev: {self.folder.url}/{base}"
              ".trace.json.gz", flush=True)  # fmt: skip

    def _poll(self, poll_s: float) -> None:
        request = profile_request(self.folder, self.attempt, self.rank)
        while not self._closed.wait(poll_s):
            try:
                if self.active or not self.folder.storage.exists(request):
                    continue
                asked = json.loads(self.folder.storage.read(request))
                self.folder.storage.delete(request)
                self._steps, self.active = min(max(int(asked["steps"]), 1), MOST_STEPS), True
            except (EverstepError, OSError, ValueError, KeyError, TypeError) as error:
                warn(f"{request} cannot be read: {error}")
                self._closed.wait(60.0)


def _profiler() -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def table(profile: Any) -> str:
    """Return the dearest operators by their own time on the device, or on the CPU without one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shown = profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=DEAREST)
    return str(shown)

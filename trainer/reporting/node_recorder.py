"""Recorder of a node's figures, in a thread of the first rank of each node.

`attempts/NNNN/nodes/NNNN.jsonl` gets a record every few seconds in the first hour and one a minute after half a day, so
that it stays small; each is the mean over the samples since the one before. The thread alone touches the counters, the
driver and the file: where one of them hangs, the thread hangs, and training goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

from everstep.config import RunConfig
from everstep.rank_env import RankInfo
from everstep.run_folder import NODES, RunFolder
from everstep.trainer.reporting.gpu_figures import GpuMeter, power_w
from everstep.trainer.reporting.host_figures import Figures, HostMeter
from everstep.trainer.reporting.sinks import JsonLines

LOG = logging.getLogger("everstep")
CLOSE_S = 2.0
"""Seconds that the end of an attempt waits for the last record."""
SHORTEST_S = 0.5
"""Seconds since the sample before from which the last one counts."""
RECORDS_PER_AGE, LONGEST_RECORD_S = 720, 60.0
"""An attempt of t seconds makes a record every t / 720 s, but at least one a minute."""
PARTS_PER_AGE, FIRST_PART_S, LONGEST_PART_S = 10, 30.0, 1800.0
"""The same for parts on a store: one every t / 10 s, at least 30 s and at most half an hour."""
WAITING = 100
"""Samples that wait for a training record; older ones are left out."""


class NodeRecorder:
    """Samples this node until it is closed."""

    def __init__(self, run: RunConfig, folder: RunFolder, attempt: int, place: RankInfo) -> None:
        """Start the thread, if this rank acts for its node and figures are wanted."""
        self._taken: deque[Figures] = deque(maxlen=WAITING)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if place.local_rank == 0 and run.log.node_every_s is not None:
            work = (run, folder, attempt, place.node, run.log.node_every_s)
            self._thread = threading.Thread(target=self._run, args=work, name="node figures", daemon=True)
            self._thread.start()

    def take(self) -> dict[str, float]:
        """Return the mean of the samples since the last call, without words; empty if there is none."""
        samples = [self._taken.popleft() for _ in range(len(self._taken))]
        return {name: value for name, value in mean(samples).items() if not isinstance(value, str)}

    def __enter__(self) -> NodeRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        """Have the last record written, and wait for it a little."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self, run: RunConfig, folder: RunFolder, attempt: int, node: int, every_s: float) -> None:
        try:
            file = JsonLines(folder.storage, folder.attempt(attempt, f"{NODES}/{node:04d}.jsonl"))
            recording = Recording(node, file, _disks(run, folder), self._taken)
            while not self._closed.wait(every_s):
                recording.sample(every_s)
            recording.end()
        except Exception:
            LOG.warning("the figures of this node end here, training goes on", exc_info=True)


def _disks(run: RunConfig, folder: RunFolder) -> dict[str, Path]:
    """Return the folders whose free space is recorded."""
    disks = {"cache": Path(run.loader.cache_folder())}
    local = folder.storage.path()
    return disks if local is None else {"run": local, **disks}


class Recording:
    """The meters of one node and the file of their records."""

    def __init__(self, node: int, file: JsonLines, disks: dict[str, Path], taken: deque[Figures]) -> None:
        """`taken` gets each sample as well."""
        self._names = {"node": node, "host": gethostname()}
        self._file, self._taken = file, taken
        self._gpus, self._host = GpuMeter(), HostMeter(disks)
        self._energy = Energy()
        self._energy.add(time.monotonic(), power_w(self._gpus.sample()))
        self._began = self._sampled = self._written = time.monotonic()
        self._pending: list[Figures] = []

    def sample(self, every_s: float) -> None:
        """Take a sample; write a record once that is due."""
        figures, now = {**self._host.sample(), **self._gpus.sample()}, time.monotonic()
        self._energy.add(now, power_w(figures))
        self._pending.append(figures)
        self._taken.append(figures)
        self._sampled = now
        age_s = now - self._began
        # Half a sample earlier, since timers are a little late: else every second record would be one sample late.
        if now - self._written >= min(age_s / RECORDS_PER_AGE, LONGEST_RECORD_S) - every_s / 2:
            self._write()

    def end(self) -> None:
        if time.monotonic() - self._sampled >= SHORTEST_S:
            self.sample(0.0)
        self._write()
        self._file.close()
        self._gpus.close()

    def _write(self) -> None:
        if not self._pending:
            return
        now = time.monotonic()
        energy = {} if self._energy.joules is None else {"energy_j": round(self._energy.joules, 1)}
        self._file.part_every_s = min(max((now - self._began) / PARTS_PER_AGE, FIRST_PART_S), LONGEST_PART_S)
        self._file.log({"time": time.time(), **self._names, **mean(self._pending), **energy})
        self._written = now
        self._pending.clear()


@dataclass
class Energy:
    """Integral of the power of a node's GPUs over the attempt."""

    joules: float | None = None
    """None while no power is known."""
    _before: tuple[float, float] | None = None

    def add(self, at_s: float, watts: float | None) -> None:
        """Add the time since the last known power, at the mean of both."""
        if watts is None:
            return
        if self._before is not None:
            then_s, then = self._before
            self.joules = (self.joules or 0.0) + (at_s - then_s) * (then + watts) / 2
        self._before = (at_s, watts)


def mean(samples: Sequence[Figures]) -> Figures:
    """Return the mean of each figure over the samples that have it, and all of their words."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: _mean([sample[name] for sample in samples if name in sample]) for name in names}


def _mean(values: Iterable[float | str]) -> float | str:
    values = list(values)
    words = dict.fromkeys(word for value in values if isinstance(value, str) for word in value.split())
    if words:
        return " ".join(words)
    numbers = [value for value in values if not isinstance(value, str)]
    return round(sum(numbers) / len(numbers), 3)

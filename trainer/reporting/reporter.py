"""Journal of an attempt on rank 0: metrics, events, progress and the terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everstep.outcome import to_json_line
from everstep.run_folder import PROGRESS, RunFolder
from everstep.trainer.checkpoint.pending_save import SaveRecord
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.reporting.background_writer import BackgroundWriter
from everstep.trainer.reporting.console import Display
from everstep.trainer.reporting.flops import peak_flops
from everstep.trainer.reporting.media import MediaLog
from everstep.trainer.reporting.sinks import Sink
from everstep.trainer.reporting.startup_timing import StartupTimer
from everstep.trainer.step_info import StepInfo
from everstep.trainer.watchdog.straggler import Straggler

LOG = logging.getLogger("everstep")
PROGRESS_EVERY_S = 2.0
COPIES_EVERY_S = 60.0
MOST_CELLS = 10
"""Cells of a metric that a line of an evaluation shows."""


@dataclass
class Speed:
    """Counts since the last record."""

    since: float
    step: int
    items: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that its records are made with."""

    steps: int
    global_batch: int
    log_every: int
    """Steps between records of the training metrics."""
    metric: str
    """Metric of the best checkpoint."""
    unit: str
    """Name of the items that the task counts."""


@dataclass(frozen=True)
class Outputs:
    """Destinations of the reports; ranks other than 0 have a silent display, no sinks and no events."""

    display: Display
    sinks: Sequence[Sink] = ()
    events: Sink | None = None
    trackers: Sequence[Sink] = ()
    """Sinks beside the run's own file: W&B and TensorBoard, which get the figures of the first node too."""
    figures: Callable[[], Mapping[str, float]] = dict
    """Return the node's figures since the last call; empty if there are none."""
    media: MediaLog | None = None
    """Log of texts, pictures, tables and histograms; None on ranks other than 0."""


class Reporter:
    """Writes on rank 0 only; the journals of the other ranks write nothing."""

    def __init__(
        self,
        facts: RunFacts,
        folder: RunFolder,
        outputs: Outputs,
        laps: StartupTimer,
        mesh: Mesh,
        checkpoint_step: int = 0,
    ) -> None:
        """`checkpoint_step` is the step of the checkpoint that this attempt resumes from."""
        self.facts = facts
        self.display, self.sinks, self.events = outputs.display, outputs.sinks, outputs.events
        self.trackers, self.figures, self.media = outputs.trackers, outputs.figures, outputs.media
        self.laps = laps
        self.world, self.device = mesh.world, mesh.device
        self.peak = peak_flops(mesh.device) if mesh.is_main else None
        """Peak FLOPs of this rank's device; None where it is unknown."""
        self._flops_per_item = 0.0
        self._speed = Speed(time.perf_counter(), 0)
        self._step = 0
        self._outbox = BackgroundWriter(folder.storage)
        self._progress_at = float("-inf")
        self._checkpoint_step = checkpoint_step
        self._begun = False
        self._copies: list[SaveRecord] = []
        """Copies to the node tier that are not recorded yet."""
        self._copied_at = float("-inf")
        self._copy_failed = False
        self._shown: dict[str, Any] = {}

    @property
    def writes(self) -> bool:
        return self.events is not None

    def event(self, kind: str, line: str = "", **facts: Any) -> None:
        """Record an event; `line` is its text on the terminal."""
        if self.events is not None:
            self.events.log({"event": kind, "time": time.time(), **facts, **({"line": line} if line else {})})
            LOG.info("%s %s", kind, line or facts)
            if line:
                self.display.say(line)

    def start(self, title: str, facts: Mapping[str, str], step: int, flops_per_item: float) -> None:
        self._flops_per_item = flops_per_item
        self._speed = Speed(time.perf_counter(), step)
        self.display.start(title, facts, step, self.facts.steps)

    def step(self, info: StepInfo, waited_s: float) -> None:
        """Record a step; every `log.every` steps are one metrics record.

        Args:
            waited_s: seconds waited for data so far in all.
        """
        if not self._begun:
            self._begun = True
            self.laps.end("first step")
            self.event("first_step", step=info.step, laps_s=self.laps.seconds)
        self._speed.items += info.items
        self._step = info.step
        if self.media is not None:
            self.media.release(info.step)
        if self.writes and (info.step % self.facts.log_every == 0 or info.step == self.facts.steps):
            record = self._record(info, waited_s)
            for sink in self.sinks:
                sink.log(record)
            self._log_figures()
            self.display.update(info.step, record)
            self._write_progress(record)

    def _log_figures(self) -> None:
        """Log the samples since the last call as one record of the last step: W&B has one row a step."""
        if self.trackers and (figures := self.figures()):
            for tracker in self.trackers:
                tracker.log({**figures, "kind": "node", "step": self._step, "time": time.time()})

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool, seconds: float = 0.0) -> None:
        self._shown |= {"metrics": dict(metrics), "metric": self.facts.metric}
        if self.media is not None:
            self.media.release(step)
        if self.writes:
            for sink in self.sinks:
                sink.log({"kind": "evaluate", "step": step, "time": time.time(), **metrics})
            shown = "  ".join(folded(metrics))
            line = f"held-out at step {step}: {shown}{'  (best so far)' if best else ''}"
            self.event("evaluated", line, step=step, seconds=round(seconds, 4), best=best)

    def pause(self, seconds: float) -> None:
        """Exclude time that was not spent on training from the rates."""
        self._speed.since += seconds

    def record_saves(self, saves: list[SaveRecord]) -> None:
        """Record the saves that have ended, and remove them from the list."""
        while saves:
            save = saves.pop(0)
            where = " on the nodes" if save.local else ""
            if save.error and save.automatic:
                if not self._copy_failed:
                    LOG.info("a copy on the nodes failed, the next is tried as usual: %s", save.error)
                self._copy_failed = True
                continue
            if save.error:
                self.event("save_failed", f"the save of step {save.step}{where} failed: {save.error}", step=save.step)
                continue
            if save.local:
                self._record_copy(save)
                continue
            self._checkpoint_step = save.step
            self.event("saved", step=save.step, seconds=round(save.stall_s, 4), durable_s=round(save.seconds, 4))
            self._progress_at = float("-inf")
            self._write_progress({"step": max(save.step, self._step)})

    def record_stragglers(self, news: deque[Straggler | None]) -> None:
        """Record the slow ranks that were found, and that there is none any more; the run goes on with them."""
        while news:
            found = news.popleft()
            self._shown["straggler"] = None if found is None else found.line
            if found is not None:
                facts = {"rank": found.rank, "node": found.host, "ratio": found.ratio, "cost": found.cost}
                self.event("straggler", found.line, step=found.step, **facts)

    def _record_copy(self, save: SaveRecord) -> None:
        """Record a save to the node tier; automatic copies, of which there may be one a second, together."""
        self._copies.append(save)
        now = time.monotonic()
        if not save.automatic or now - self._copied_at >= COPIES_EVERY_S:
            self._write_copies()
            self._copied_at = now

    def _write_copies(self) -> None:
        if self._copies:
            seconds = round(sum(copy.stall_s for copy in self._copies), 4)
            self.event("saved_locally", step=self._copies[-1].step, seconds=seconds, copies=len(self._copies))
            self._copies.clear()

    def close(self) -> None:
        self.display.close()
        self._write_copies()
        if self.media is not None:
            self.media.close()
        if self._begun:
            self._log_figures()
        self._outbox.close()
        for sink in self.sinks:
            sink.close()
        if self.events is not None:
            self.events.close()

    def _record(self, info: StepInfo, waited_s: float) -> dict[str, Any]:
        now, speed = time.perf_counter(), self._speed
        seconds = max(now - speed.since, 1e-9)
        record: dict[str, Any] = {
            **info.metrics,
            "kind": "train",
            "step": info.step,
            "time": time.time(),
            "loss": info.loss,
            "lr": info.lr,
            "norm": info.norm,
            "items": info.items,
            "samples": info.step * self.facts.global_batch,
            "unit": self.facts.unit,
            "items_per_s": speed.items / seconds,
            "steps_per_s": (info.step - speed.step) / seconds,
            "data_wait": (waited_s - speed.waited_s) / seconds,
            "memory_mb": memory_mb(self.device),
        }
        if self.peak and self._flops_per_item:
            record["mfu"] = self._flops_per_item * record["items_per_s"] / (self.peak * self.world)
        self._speed = Speed(now, info.step, 0, waited_s)
        return record

    def _write_progress(self, record: Mapping[str, Any]) -> None:
        """Write the progress that `status` shows of a running run: best effort, a few times per minute."""
        now, steps = time.monotonic(), self.facts.steps
        if not self.writes or (now - self._progress_at < PROGRESS_EVERY_S and record["step"] != steps):
            return
        self._progress_at = now
        # A save has no rate of its own, so the last one remains.
        self._shown |= {key: record[key] for key in ("steps_per_s", "loss") if key in record}
        rate = self._shown.get("steps_per_s")
        facts = {
            **self._shown,
            "step": record["step"],
            "steps": steps,
            "eta_s": (steps - record["step"]) / rate if rate else None,
            "next_s": self.facts.log_every / rate if rate else None,
            "checkpoint_step": self._checkpoint_step,
            "time": time.time(),
        }
        self._outbox.put(PROGRESS, to_json_line(facts))


def memory_mb(device: torch.device) -> float:
    """Return the peak memory in MiB: the device's on CUDA, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def folded(metrics: Mapping[str, float]) -> list[str]:
    """Return each metric as text; of one with many cells (NAME/ROW/COLUMN) their number alone."""
    wholes = {name: re.sub(r"(/\d+)+$", "", name) for name in metrics}
    cells = Counter(wholes.values())
    shown = [f"{name} {value:.4g}" for name, value in metrics.items() if cells[wholes[name]] <= MOST_CELLS]
    return shown + [f"{whole} ({count} values)" for whole, count in cells.items() if count > MOST_CELLS]

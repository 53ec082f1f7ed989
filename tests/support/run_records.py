"""Run folders as a trainer leaves them, written by hand and with times of one's own."""

from __future__ import annotations

import json
import time
from typing import Any

from everstep.config import RunConfig
from everstep.frozen_config import freeze
from everstep.launch.schedulers.job import JobHandle
from everstep.outcome import Ending, Outcome
from everstep.run_folder import CONFIG, EVENTS, METRICS, PROGRESS, RESTARTS, SUBMISSIONS, RunFolder


class Records:
    """One run; times are seconds from its beginning, which was `ago_s` seconds ago."""

    def __init__(self, url: str, ago_s: float = 1000.0, **config: Any) -> None:
        self.folder = RunFolder(url)
        self.began = time.time() - ago_s
        self.folder.storage.write(CONFIG, freeze(RunConfig(run=url.rsplit("/", 1)[-1], **config)).encode())

    def write(self, path: str, *facts: dict[str, Any]) -> None:
        self.folder.storage.write(path, "\n".join(map(json.dumps, facts)).encode())

    def attempt(
        self, number: int, at: float, host: str = "elsewhere", restored: int | None = None, **more: Any
    ) -> None:
        claim = {"host": host, "pid": 1, "world": 2, "began": self.began + at, "time": self.began + at + 1, **more}
        self.write(self.folder.attempt(number, "claim.json"), claim)
        if restored is not None:
            self.write(self.folder.attempt(number, "restored.json"), {"step": restored, "attempt": number - 1})

    def events(self, number: int, *events: tuple[float, str, dict[str, Any]]) -> None:
        self.write(self.folder.attempt(number, EVENTS),
                   *({"event": kind, "time": self.began + at, **facts} for at, kind, facts in events))  # fmt: skip

    def steps(self, number: int, *records: tuple[float, int], rate: float = 1.0, data_wait: float = 0.0) -> None:
        self.write(self.folder.attempt(number, METRICS), *(
            {"kind": "train", "step": step, "time": self.began + at, "loss": 1.0, "steps_per_s": rate,
             "data_wait": data_wait} for at, step in records))  # fmt: skip

    def log(self, number: int, text: str, rank: int = 0) -> None:
        self.folder.storage.write(self.folder.attempt(number, f"rank-{rank:04d}.log"), text.encode())

    def end(self, number: int, at: float, outcome: str, step: int = 0, reason: str = "", rank: int = 0) -> None:
        facts = json.loads(Ending(Outcome(outcome), step, reason, rank=rank).to_json())
        self.write(self.folder.attempt(number, "outcome.json"), {**facts, "time": self.began + at})

    def decide(self, number: int, at: float, go_on: bool, reason: str) -> None:
        self.write(f"{RESTARTS}/{number:04d}.json", {"time": self.began + at, "go_on": go_on, "reason": reason})

    def progress(self, at: float, step: int, steps: int, **more: Any) -> None:
        self.write(PROGRESS, {"time": self.began + at, "step": step, "steps": steps, **more})

    def submit(self, number: int, at: float, handle: JobHandle | None, token: str = "t") -> None:
        facts = {"token": token, "scheduler": "slurm", "time": self.began + at, "host": "gone", "pid": 1,
                 "argv": [], "code": "the code of the first submission"}  # fmt: skip
        self.write(f"{SUBMISSIONS}/{number:04d}.json", facts)
        if handle is not None:
            self.write(f"{SUBMISSIONS}/{number:04d}.handle.json", {"handle": str(handle)})

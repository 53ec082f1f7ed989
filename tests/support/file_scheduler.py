"""A small scheduler that is real as far as it goes: its jobs stand in a file, so that any process may ask for them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Ask, Batch, Program, Rendered
from everstep.launch.schedulers.job import JobHandle, JobState, JobStatus

VARIABLE = "FILE_SCHEDULER"
"""Environment variable: the file."""


class FileScheduler:
    """Answers to the name `slurm` in tests of what works with any scheduler."""

    def __init__(self) -> None:
        self.file = Path(os.environ[VARIABLE])

    def known(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.exists() else {"jobs": {}, "queries": 0}

    def keep(self, known: dict[str, Any]) -> None:
        self.file.write_text(json.dumps(known))

    def set(self, job: str, **facts: Any) -> JobHandle:
        known = self.known()
        known["jobs"][job] = {"state": "pending", **known["jobs"].get(job, {}), **facts}
        self.keep(known)
        return JobHandle("slurm", "file", job)

    def render(self, job: JobConfig, program: Program) -> Rendered:
        return Rendered((program.name, program.token, *program.argv))

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        refused: list[str] = self.known().get("problems", [])
        return refused

    def submit(self, rendered: Rendered) -> JobHandle:
        number = str(len(self.known()["jobs"]) + 1)
        return self.set(number, token=rendered.argv[1], argv=list(rendered.argv[2:]))

    def find(self, token: str) -> JobHandle | None:
        return next((JobHandle("slurm", "file", number) for number, job in self.known()["jobs"].items()
                     if job.get("token") == token), None)  # fmt: skip

    def status(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        known = self.known()
        if known.get("away"):
            raise ConfigError("the controller does not answer")
        known["queries"] += 1
        self.keep(known)
        return {handle: _status(known["jobs"].get(handle.id, {"state": "unknown"})) for handle in handles}

    def follow(self) -> AbstractContextManager[Ask]:
        return nullcontext(self.status)

    def cancel(self, handles: Sequence[JobHandle]) -> None:
        for handle in handles:
            self.set(handle.id, state="cancelled")


def _status(job: dict[str, Any]) -> JobStatus:
    nodes, started = tuple(job.get("nodes", ())), job.get("started_at")
    token = job.get("token", "").partition(".")[0]  # Slurm's elements have the comment of their array
    state, reason = JobState(job["state"]), job.get("reason", "")
    return JobStatus(state, reason, nodes, started_at=started, worn=job.get("worn", ""), token=token)


class FileArrays(FileScheduler):
    """One that takes batches too: element N of job 3 is job 3_N."""

    def largest_batch(self) -> int:
        return int(self.known().get("largest", 1001))

    def render_batch(self, job: JobConfig, batch: Batch) -> Rendered:
        lines = [line.partition("\t")[0] for line in Path(batch.list).read_text().splitlines()]
        after = [handle.id for handle in batch.after]
        files = {str(number): lines[number] for number in batch.elements}
        return Rendered(("batch", batch.token, str(batch.parallel), *after), files)

    def limit(self, handles: Sequence[JobHandle], parallel: int) -> None:
        known = self.known()
        for id in {handle.id.partition("_")[0] for handle in handles} & known["batches"].keys():
            known["batches"][id]["parallel"] = parallel
        self.keep(known)

    def submit(self, rendered: Rendered) -> JobHandle:
        if rendered.argv[0] != "batch":
            return super().submit(rendered)
        _, token, parallel, *after = rendered.argv
        known = self.known()
        whole = JobHandle("slurm", "file", str(len(known["jobs"]) + 1))
        for number, url in rendered.files.items():
            argv = ["-m", "everstep.trainer", "--frozen", url]
            known["jobs"][f"{whole.id}_{number}"] = {"state": "pending", "token": f"{token}.{number}", "argv": argv}
        facts = {"token": token, "size": len(rendered.files), "parallel": int(parallel), "after": after}
        known.setdefault("batches", {})[whole.id] = facts
        self.keep(known)
        return whole

    def find(self, token: str) -> JobHandle | None:
        batches: dict[str, Any] = self.known().get("batches", {})
        found = next((JobHandle("slurm", "file", id) for id, batch in batches.items() if batch["token"] == token), None)
        return found or super().find(token)

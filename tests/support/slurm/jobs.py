"""Runs of the toy on the test cluster, as a user starts them and looks at them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.launch.job_start.allocation import expand
from everstep.run_folder import RunFolder
from support import PATHS, TESTS, ledger_toy, warm
from support.fake_trainer import HELD_AT
from support.slurm.cluster import Cluster

PATIENCE_S = 280.0
"""For a machine that has much else to do; an idle one needs a fifth of it."""


def executed(words: list[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, timeout=timeout, capture_output=True, text=True, check=False, **options)


class Looks:
    """All jobs by one question, asked for all threads together: a test must not be what the machine works on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at = 0.0
        self._jobs: dict[str, dict[str, str]] = {}

    def facts(self, cluster: Cluster) -> dict[str, dict[str, str]]:
        with self._lock:
            if time.monotonic() - self._at > 0.3:
                shown = cluster.output("scontrol", "show", "job", "-o", "-a")
                words = [
                    dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown.splitlines()
                ]
                # While the controller is away, what it said last stands.
                self._jobs |= {facts["JobId"]: facts for facts in words if "JobId" in facts}
                self._at = time.monotonic()
            return self._jobs


LOOKS = Looks()


@dataclass
class Job:
    """A run on the cluster and its job."""

    cluster: Cluster
    root: Path
    name: str
    path: str = PATHS
    """PYTHONPATH of the job."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(str(self.root / self.name))

    @property
    def ledger(self) -> Path:
        return self.root / "ledgers" / self.name

    def submit(self, *words: str, quick: bool = True, env: dict[str, str] | None = None) -> str:
        """`everstep submit` of the toy; what it prints. `quick` because most tests are about what comes after."""
        toy = ["--config-dir", str(TESTS / "conf")]
        keys = ["job=slurm", "job.nproc=1", "job.gpus=0", "job.flags=[--exclusive]", "job.time=1h", "job.grace_s=10",
                f"job.env.PYTHONPATH={self.path}", "experiment=ledger_toy", f"data.ledger={self.ledger}"]  # fmt: skip
        how = ["--quick"] if quick else []
        return self.everstep("submit", *how, *toy, *keys, *words, f"run={self.name}", f"run_root={self.root}", env=env)

    def everstep(self, *words: str, env: dict[str, str] | None = None, where: Path | None = None) -> str:
        environment = {**self.cluster.env, "PYTHONPATH": PATHS, **(env or {})}
        argv = [sys.executable, "-m", "everstep.launch", *words]
        run = warm.run if environment["PYTHONPATH"] == PATHS else executed  # another path may bring a sitecustomize
        done = run(argv, 120, cwd=where or self.root, env=environment)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
        return done.stdout

    @property
    def id(self) -> str:
        last = sorted((self.root / self.name / "submissions").glob("*.handle.json"))[-1]
        return str(json.loads(last.read_text())["handle"]).rsplit("/", 1)[-1]

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says, or said last while the controller is away; nothing before that."""
        return LOOKS.facts(self.cluster).get(self.id, {})

    @property
    def nodes(self) -> list[str]:
        return list(expand(self.facts()["NodeList"]))

    @property
    def restarts(self) -> int:
        return int(self.facts().get("Restarts", "0"))

    def is_over(self) -> bool:
        return self.facts().get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def step(self, start: int | None = None) -> int:
        """The last step that any process has begun, of all starts or of one."""
        return ledger_toy.last_step(self.ledger, "" if start is None else f"start-{start:04d}-")

    def wait_for_step(self, step: int) -> None:
        self.until(lambda: self.step() >= step, f"step {step}")

    def wait(self) -> None:
        """Until the job is over, and COMPLETED."""
        self.until(self.is_over, "the end")
        assert self.facts()["JobState"] == "COMPLETED", self.printed()

    def until(self, fits: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not fits():
            if time.monotonic() > deadline or (what != "the end" and self.is_over()):
                raise TimeoutError(f"{self.name}: no {what} ({self.facts()}): {self.printed()}")
            time.sleep(0.2)

    def printed(self) -> str:
        return "\n".join(file.read_text() for file in sorted((self.root / self.name).glob("slurm-*.out")))

    def causes(self) -> list[str]:
        """Why each start ended."""
        files = sorted((self.root / self.name / "restarts").glob("*.json"))
        return [json.loads(file.read_text())["cause"] for file in files]


FAKE_FIRST = os.pathsep.join([str(TESTS / "support/fake_trainer_first"), PATHS])


class FakeJob(Job):
    """A job on one node whose trainer imports no torch. It waits in its middle while the file `hold` is there."""

    def __init__(self, cluster: Cluster, root: Path, name: str) -> None:
        super().__init__(cluster, root, name, FAKE_FIRST)
        self.hold = root / f"hold-{name}"

    def submit_held(self, *words: str) -> None:
        """The fault may come when it is in its middle; the next start goes on from there, and does not wait again."""
        self.hold.touch()
        self.submit("job.nodes=1", "job.warm=false", *words, env={"FAKE_TRAINER_HOLD": str(self.hold)})
        self.until(lambda: self.step() >= HELD_AT, f"step {HELD_AT}")

    def steps(self) -> list[list[int]]:
        """Those that each attempt has done."""
        files = sorted((self.root / self.name).glob("attempts/*/metrics.jsonl"))
        lines = [file.read_text().splitlines(keepends=True) for file in files]
        return [[record["step"] for record in map(json.loads, filter(lambda line: line.endswith("\n"), part))
                 if record["kind"] == "train"] for part in lines]  # fmt: skip

    def step(self, start: int | None = None) -> int:
        return max((step for part in self.steps() for step in part), default=0)

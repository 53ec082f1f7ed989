"""Runs of the toy on the simulated cluster, as a user starts them and looks at them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger_toy
from kube_cluster import Cluster
from process_helpers import until

from trainer.run_folder import RunFolder

TESTS = Path(__file__).parent.parent.parent
PATHS = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "cluster")))
PATIENCE_S = 200.0


@dataclass
class Run:
    cluster: Cluster
    root: Path
    name: str

    @property
    def folder(self) -> RunFolder:
        return RunFolder(str(self.root / self.name))

    @property
    def ledger(self) -> Path:
        return self.root / "ledgers" / self.name

    def words(self, *words: str) -> list[str]:
        """All that `everstep submit` is told, but for the verb."""
        env = {"PYTHONPATH": PATHS, "GLOO_SOCKET_IFNAME": "lo"}
        return [
            "--config-dir", str(TESTS / "conf"), "--config-dir", str(TESTS / "cluster/conf"),
            "job=k8s", "job.nproc=1", "job.gpus=0", "job.threads=1", "job.grace_s=20", "job.image=toy",
            f"job.python={sys.executable}", f"job.k8s.claims.runs={self.root}",
            *(f"job.env.{key}={value}" for key, value in env.items()),
            "experiment=ledger_toy", f"data.ledger={self.ledger}", f"run={self.name}", f"run_root={self.root}", *words,
        ]  # fmt: skip

    def submit(self, *words: str) -> str:
        """`--quick` because most tests are about what comes after."""
        return self.everstep("submit", "--quick", *self.words(*words))

    def everstep(self, *words: str, code: int = 0) -> str:
        child = self.start(*words)
        printed = "".join(child.communicate(timeout=120))
        assert child.returncode == code, printed
        return printed

    def start(self, *words: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": PATHS, "KUBECONFIG": str(self.cluster.kubeconfig)}
        return subprocess.Popen([sys.executable, "-m", "launch", *words], cwd=self.root, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    @property
    def job(self) -> str:
        last = sorted((self.root / self.name / "submissions").glob("*.handle.json"))[-1]
        return str(json.loads(last.read_text())["handle"]).rsplit("/", 1)[-1]

    def pod(self, index: int) -> dict[str, Any]:
        """The newest pod of an index that runs."""
        alive = [pod for pod in self.cluster.pods(self.job, "Running") if "deletionTimestamp" not in pod["metadata"]]
        return next(pod for pod in alive if pod["spec"]["hostname"].endswith(f"-{index}"))

    def condition(self) -> str | None:
        """Complete or Failed, once it is."""
        kinds = [each["type"] for each in self.cluster.job(self.job)["status"].get("conditions", [])]
        return next((kind for kind in kinds if kind in ("Complete", "Failed")), None)

    def wait_for_step(self, step: int) -> None:
        self.until(lambda: ledger_toy.last_step(self.ledger) >= step, f"step {step}")

    def wait(self, how: str = "Complete") -> None:
        self.until(lambda: self.condition() is not None, "end")
        assert self.condition() == how, self.printed()

    def until(self, fits: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not fits():
            assert time.monotonic() < deadline, f"{self.name}: no {what}: {self.printed()}"
            assert what == "end" or self.condition() is None, f"{self.name} is over: {self.printed()}"
            time.sleep(0.05)

    def until_gone(self) -> None:
        """Nothing that the run has made is left."""
        kinds = ("jobs", "pods", "services", "configmaps")
        until(lambda: not any(self.cluster.store.list(kind) for kind in kinds))

    def printed(self) -> str:
        logs = sorted((self.cluster.folder / "nodes").glob("*/*/log"), key=lambda log: log.stat().st_mtime)
        return "\n".join(f"== {log.parent}\n{log.read_text()[-1500:]}" for log in logs) + str(self.cluster.errors)

    def causes(self) -> list[str]:
        files = sorted((self.root / self.name / "restarts").glob("*.json"))
        return [json.loads(file.read_text())["cause"] for file in files]

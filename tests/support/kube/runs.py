"""Runs of the toy on whatever cluster there is, as a user starts them and looks at them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.run_folder import RunFolder
from support import TESTS, ledger_toy
from support.kube.place import LOOK_S, PATHS, PATIENCE_S, Place

TOY = ("__init__.py", "toy.py", "ledger_toy.py")


@dataclass
class Run:
    place: Place
    root: Path
    name: str
    kubeconfig: str | None = None
    """Of the launcher, where it goes another way."""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(str(self.root / self.name))

    @property
    def ledger(self) -> Path:
        return self.root / "ledgers" / self.name

    def words(self, *words: str) -> list[str]:
        """All that `everstep submit` is told, but for the verb. Pods find the toy where the runs are."""
        code = self.root / "toy"
        (code / "support").mkdir(parents=True, exist_ok=True)
        for file in TOY:
            shutil.copy(TESTS / "support" / file, code / "support")
        return [
            "--config-dir", str(TESTS / "conf"),
            "job=k8s", "job.nproc=1", "job.gpus=0", "job.grace_s=20", f"job.k8s.namespace={self.place.namespace}",
            *self.place.words, f"job.env.PYTHONPATH={code}:{PATHS}" if self.place.agents else
            f"job.env.PYTHONPATH={code}", "experiment=ledger_toy", f"data.ledger={self.ledger}", f"run={self.name}",
            f"run_root={self.root}", *words,
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
        return self.place.start(self.root, *words, kubeconfig=self.kubeconfig)

    @property
    def job(self) -> dict[str, Any]:
        last = sorted((self.root / self.name / "submissions").glob("*.handle.json"))[-1]
        return self.place.job(str(json.loads(last.read_text())["handle"]).rsplit("/", 1)[-1])

    def pod(self, index: int) -> dict[str, Any]:
        """The one of an index that runs, or has done its work."""
        name = self.job["metadata"]["name"]
        ours = [pod for pod in self.place.pods() if pod["metadata"]["labels"].get("job-name") == name
                and pod["status"].get("phase") in ("Running", "Succeeded")]  # fmt: skip
        return next(pod for pod in ours if "deletionTimestamp" not in pod["metadata"]
                    and pod["spec"]["hostname"].endswith(f"-{index}"))  # fmt: skip

    def condition(self) -> str | None:
        """Complete or Failed, once it is."""
        kinds = [each["type"] for each in self.job.get("status", {}).get("conditions", [])]
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
            time.sleep(LOOK_S)

    def until_gone(self) -> None:
        """Nothing that the run has made is left."""
        label = f"labelSelector=everstep.dev/run%3D{self.name}"
        core = f"/api/v1/namespaces/{self.place.namespace}"
        paths = [f"/apis/batch/v1/namespaces/{self.place.namespace}/jobs",
                 *(f"{core}/{kind}" for kind in ("pods", "services", "configmaps"))]  # fmt: skip
        self.place.until(lambda: not any(self.place.client.items(f"{path}?{label}") for path in paths))

    def printed(self) -> str:
        logs = [f"== {pod['metadata']['name']}: {pod['status']}\n{self.place.log(pod)[-1500:]}"
                for pod in self.place.pods()]  # fmt: skip
        return "\n".join(logs)

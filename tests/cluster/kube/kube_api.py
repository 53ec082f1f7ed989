"""A namespace of its own on whatever cluster EVERSTEP_KUBECONFIG says; else on a simulated one, in a process of
its own, so that nothing but its API server can be reached."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config import JobConfig, job_config
from launch.schedulers.base import Program, Rendered
from launch.schedulers.kubernetes.client import Client
from launch.schedulers.kubernetes.cluster import Kubernetes

HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE.parent.parent.parent, HERE.parent.parent, HERE.parent, HERE)))
PATIENCE_S = 280.0
"""A real cluster pulls an image first, and waits 10 s before it replaces a pod."""
LOOK_S = 0.2
"""Between two looks: what is looked at is far away, and each look costs it something."""
WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"


@dataclass
class Place:
    """All that a test knows of a cluster: a kubeconfig and a namespace."""

    kubeconfig: str
    image: str
    words: list[str]
    """What submissions are told besides, so that pods and this machine see one run folder; empty where they cannot."""
    run_root: str

    def __post_init__(self) -> None:
        self.namespace = f"everstep-test-{uuid.uuid4().hex[:8]}"
        self.client = Client(None, self.namespace)

    def config(self, folder: Path, shell: str = WAIT, **keys: Any) -> JobConfig:
        """Pods are a shell."""
        patch = {"spec": {"template": {"spec": {"containers": [{"name": "train", "command": ["sh", "-c", shell]}]}}}}
        (folder / "patch.yaml").write_text(json.dumps(patch))
        given = {"nodes": 2, "nproc": 1, "gpus": 0, "image": self.image, **keys}
        k8s = {"overlay": str(folder / "patch.yaml"), "namespace": self.namespace}
        return job_config({"scheduler": "k8s", **given, "k8s": k8s})

    def rendered(self, job: JobConfig, token: str) -> Rendered:
        return Kubernetes(job).render(job, Program("demo", "s3://runs/demo", ("-m", "trainer"), token, "steps: 5\n"))

    def pods(self) -> list[dict[str, Any]]:
        return self.client.items(f"/api/v1/namespaces/{self.namespace}/pods")

    def running(self) -> list[dict[str, Any]]:
        return [pod for pod in self.pods() if pod.get("status", {}).get("phase") == "Running"
                and "deletionTimestamp" not in pod["metadata"]]  # fmt: skip

    def jobs(self) -> list[dict[str, Any]]:
        return self.client.items(f"/apis/batch/v1/namespaces/{self.namespace}/jobs")

    def make(self, thing: dict[str, Any]) -> None:
        self.client.create(f"/api/v1/namespaces/{self.namespace}/{thing['kind'].lower()}s", thing)

    def told(self) -> str:
        """All that stands in the namespace, but for its secrets: objects, events, and what pods have printed."""
        core = f"/api/v1/namespaces/{self.namespace}"
        paths = [f"{core}/{kind}" for kind in ("pods", "services", "configmaps", "events")]
        found = [*self.jobs(), *(each for path in paths for each in self.client.items(path))]
        logs = [self.client._watches.get(f"{core}/pods/{pod['metadata']['name']}/log").text for pod in self.pods()]
        return json.dumps(found) + "".join(logs)

    def evict(self, pod: dict[str, Any]) -> None:
        """As a drain does it."""
        metadata = {"name": pod["metadata"]["name"], "namespace": self.namespace}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{metadata['name']}/eviction"
        self.client.create(path, {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata})

    def until(self, fits: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not fits():
            assert time.monotonic() < deadline, [pod.get("status") for pod in self.pods()]
            time.sleep(LOOK_S)

    def start(self, folder: Path, *words: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": PATHS, "KUBECONFIG": self.kubeconfig}
        return subprocess.Popen([sys.executable, "-m", "launch", *words], cwd=folder, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def everstep(self, folder: Path, *words: str) -> str:
        child = self.start(folder, *words)
        printed = "".join(child.communicate(timeout=120))
        assert child.returncode == 0, printed
        return printed


@contextlib.contextmanager
def place(folder: Path) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        if kubeconfig := os.environ.get("EVERSTEP_KUBECONFIG"):
            image, root = os.environ.get("EVERSTEP_IMAGE") or "busybox", os.environ.get("EVERSTEP_RUN_ROOT") or ""
            words = [f"job.image={image}"] if root else []
        else:
            kubeconfig, image, root = stack.enter_context(_simulated(folder)), "any", str(folder / "runs")
            words = [f"job.image={image}", f"job.k8s.claims.runs={root}", f"job.python={sys.executable}",
                     f"job.env.PYTHONPATH={PATHS}", "job.env.GLOO_SOCKET_IFNAME=lo", "job.threads=1"]  # fmt: skip
        stack.enter_context(_environment("KUBECONFIG", kubeconfig))
        made = Place(kubeconfig, image, words, root)
        # Where there is Pod Security, it says itself whether our pods pass.
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        metadata = {"name": made.namespace, "labels": labels}
        made.client.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        stack.callback(made.client.remove, f"/api/v1/namespaces/{made.namespace}")
        yield made


@contextlib.contextmanager
def _simulated(folder: Path) -> Iterator[str]:
    words = [sys.executable, str(HERE / "kube_process.py"), str(folder), "3", "0.05"]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": PATHS}, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdin is not None
        yield child.stdout.readline().strip()
        child.stdin.close()
        assert child.wait(30) == 0


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

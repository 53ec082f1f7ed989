"""A namespace of its own on whatever cluster EVERSTEP_KUBECONFIG says; else on a simulated one. Its control plane
and its nodes are processes of their own, so that nothing but its API server can be reached."""

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

from everstep.launch.config import JobConfig, job_config
from everstep.launch.schedulers.base import Program, Rendered
from everstep.launch.schedulers.kubernetes.client import Client
from everstep.launch.schedulers.kubernetes.scheduler import Kubernetes
from support import PATHS
from support.kube.node_agent import HEARTBEAT_S
from support.kube.node_agents import Agents

PATIENCE_S = 280.0
"""A real cluster pulls an image first, and waits 10 s before it replaces a pod."""
LOOK_S = 0.2
"""Between two looks: what is looked at is far away, and each look costs it something."""
SCALE = 0.05
"""Of the simulated cluster."""
CLAIM = "runs"
KILL_NODE, FORGET = "EVERSTEP_KILL_NODE", "EVERSTEP_FORGET"
WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"


@dataclass
class Place:
    """All that a test knows of a cluster: a kubeconfig and a namespace."""

    kubeconfig: str
    image: str
    run_root: str
    """Empty where pods and this machine see no place together."""
    scale: float = 1.0
    """Seconds here for each second of a real cluster."""
    simulated: bool = False
    agents: Agents | None = None
    """Nodes of our own, if it has any."""
    popen: type[subprocess.Popen[str]] = subprocess.Popen
    """Of launchers."""

    def __post_init__(self) -> None:
        self.namespace = f"everstep-test-{uuid.uuid4().hex[:8]}"
        self.client = Client(None, self.namespace)
        self.cordoned: set[str] = set()

    @property
    def root(self) -> Path | None:
        """The run root where it is a folder; a claim brings it into the pods, at the same place."""
        return Path(self.run_root) if self.run_root.startswith("/") else None

    @property
    def words(self) -> list[str]:
        """What submissions are told besides; where pods are processes of this machine, also what they run."""
        claims = [f"job.k8s.claims.{CLAIM}={self.run_root}"] if self.root else []
        ours = ["job.env.GLOO_SOCKET_IFNAME=lo", f"job.python={sys.executable}", f"job.env.PYTHONPATH={PATHS}"]
        return [f"job.image={self.image}", "job.threads=1", *claims, *(ours if self.agents else [])]

    def claim(self) -> None:
        """A volume that every node has at this path, and a claim of it."""
        volume, core = f"{self.namespace}-{CLAIM}", "/api/v1"
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
        self.client.create(f"{core}/persistentvolumes", {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
            "spec": {"capacity": size, "accessModes": modes, "hostPath": {"path": self.run_root},
                     "storageClassName": "", "claimRef": {"namespace": self.namespace, "name": CLAIM}}})  # fmt: skip
        self.client.create(f"{core}/namespaces/{self.namespace}/persistentvolumeclaims", {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM},
            "spec": {"accessModes": modes, "storageClassName": "", "volumeName": volume,
                     "resources": {"requests": size}}})  # fmt: skip

    def leave(self) -> None:
        """With all that was made: the namespace, the volume, nodes that were cordoned."""
        self.client.remove(f"/api/v1/namespaces/{self.namespace}")
        if self.root:
            self.client.remove(f"/api/v1/persistentvolumes/{self.namespace}-{CLAIM}")
        for node in self.cordoned:
            self.client.change(f"/api/v1/nodes/{node}", {"spec": {"unschedulable": None}})
        if self.agents:
            self.until(lambda: not self.pods())  # pods are somebody's until their node has said that they are over

    # Faults

    def evict(self, pod: dict[str, Any]) -> None:
        """As a drain does it."""
        metadata = {"name": pod["metadata"]["name"], "namespace": self.namespace}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{metadata['name']}/eviction"
        self.client.create(path, {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata})

    def drain(self, node: str) -> None:
        """Cordoned, and all pods of ours evicted."""
        self.client.change(f"/api/v1/nodes/{node}", {"spec": {"unschedulable": True}})
        self.cordoned.add(node)
        for pod in self.running():
            if pod["spec"]["nodeName"] == node:
                self.evict(pod)

    def why_no_node_dies(self) -> str:
        """Empty where one can be made to."""
        if self.agents or os.environ.get(KILL_NODE):
            return ""
        return f"{KILL_NODE} is not set: a command that ends a node without a word, with {{node}} for its name"

    def kill_node(self, node: str) -> None:
        """It dies without a word, and somebody who knows that it is off says so."""
        if self.agents is not None and node in self.agents:
            self.agents.die(node)
        else:
            subprocess.run(os.environ[KILL_NODE].format(node=node), shell=True, check=True, timeout=120)
        path = f"/api/v1/nodes/{node}"
        known = (self.client.read(path) or {}).get("spec", {}).get("taints") or []
        off = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
        self.client.change(path, {"spec": {"taints": [*known, off]}})

    def why_nothing_is_forgotten(self) -> str:
        """Empty where the server can be made to."""
        if self.simulated or os.environ.get(FORGET):
            return ""
        return f"{FORGET} is not set: a command after which the API server has lost its history, as by a restart"

    def forget(self) -> None:
        """The history of all objects is gone."""
        if self.simulated:
            self.client.create("/simulation/forget", {})
        else:
            subprocess.run(os.environ[FORGET], shell=True, check=True, timeout=120)

    def forgets(self) -> int | None:
        """How many watches have been told so; None where nobody counts them."""
        return int((self.client.read("/simulation/forgets") or {})["watches"]) if self.simulated else None

    # Jobs and pods

    def config(self, folder: Path, shell: str = WAIT, **keys: Any) -> JobConfig:
        """Pods are a shell."""
        patch = {"spec": {"template": {"spec": {"containers": [{"name": "train", "command": ["sh", "-c", shell]}]}}}}
        (folder / "patch.yaml").write_text(json.dumps(patch))
        given = {"nodes": 2, "nproc": 1, "gpus": 0, "image": self.image, **keys}
        k8s = {"overlay": str(folder / "patch.yaml"), "namespace": self.namespace}
        return job_config({"scheduler": "k8s", **given, "k8s": k8s})

    def rendered(self, job: JobConfig, token: str) -> Rendered:
        return Kubernetes(job).render(
            job, Program("demo", "s3://runs/demo", ("-m", "everstep.trainer"), token, "steps: 5\n")
        )

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
        return json.dumps(found) + "".join(self.log(pod) for pod in self.pods())

    def job(self, name: str) -> dict[str, Any]:
        return self.client.read(f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{name}") or {}

    def log(self, pod: dict[str, Any]) -> str:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/log"
        return str(self.client._watches.get(path).text)

    def until(self, fits: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not fits():
            assert time.monotonic() < deadline, [pod.get("status") for pod in self.pods()]
            time.sleep(LOOK_S)

    def start(self, folder: Path, *words: str, kubeconfig: str | None = None) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": PATHS, "KUBECONFIG": kubeconfig or self.kubeconfig}
        return self.popen([sys.executable, "-m", "everstep.launch", *words], cwd=folder, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def everstep(self, folder: Path, *words: str) -> str:
        child = self.start(folder, *words)
        printed = "".join(child.communicate(timeout=120))
        assert child.returncode == 0, printed
        return printed


@contextlib.contextmanager
def place(folder: Path, nodes: int = 3, popen: type[subprocess.Popen[str]] = subprocess.Popen) -> Iterator[Place]:
    """A namespace that is removed afterwards; on one without kubelets, as the simulated, with nodes of our own.

    `popen`: of launchers, of these nodes and of their pods.
    """
    with contextlib.ExitStack() as stack:
        if kubeconfig := os.environ.get("EVERSTEP_KUBECONFIG"):
            simulated = False
            nodes = int(os.environ.get("EVERSTEP_NODES") or 0)
            image, root, scale = os.environ.get("EVERSTEP_IMAGE") or "busybox", os.environ.get("EVERSTEP_RUN_ROOT"), 1.0
        else:
            kubeconfig, simulated = stack.enter_context(_simulated(folder)), True
            image, root, scale = "any", str(folder / "runs"), SCALE
        stack.enter_context(_environment("KUBECONFIG", kubeconfig))
        made = Place(kubeconfig, image, root or "", scale, simulated, popen=popen)
        if nodes:
            names = [f"{made.namespace}-{number}" for number in range(nodes)]
            made.agents = Agents(kubeconfig, folder / "nodes", names, max(HEARTBEAT_S * scale, 0.5), popen=popen)
            for name in names:  # or the next pods go to nodes that nobody has missed yet
                stack.callback(made.client.remove, f"/api/v1/nodes/{name}")
            stack.callback(made.agents.stop)
        # Where there is Pod Security, it says itself whether our pods pass.
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        metadata = {"name": made.namespace, "labels": labels}
        made.client.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        stack.callback(made.leave)
        if made.root:
            made.claim()
        yield made


@contextlib.contextmanager
def _simulated(folder: Path) -> Iterator[str]:
    words = [sys.executable, "-m", "support.kube.cluster", str(folder), str(SCALE)]
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

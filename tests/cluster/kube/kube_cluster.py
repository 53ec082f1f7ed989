"""A simulated Kubernetes: API server, scheduler, controllers and nodes in this process, pods as real processes.

It is no Kubernetes. It does, case by case, what a real 1.36 was measured to do with a job of ours; test_conformance.py
lists the cases. Times are scaled: `scale` seconds here are one second there.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kube_jobs import Jobs
from kube_nodes import Node, Process
from kube_server import Server
from kube_store import ApiError, Plain, Store
from process_helpers import until

TICK_S = 0.02
NOTICE_S, EVICT_EVERY_S, COLLECT_S, QUARANTINE_S = 50.0, 10.0, 20.0, 40.0
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
UNREACHABLE = "node.kubernetes.io/unreachable"
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}


@dataclass
class Cluster:
    folder: Path
    scale: float = 0.05
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store()
        self.store.create(("namespaces", "", "default"), {"kind": "Namespace", "metadata": {"name": "default"}})
        self.server = Server(self.store, 60.0 * self.scale)
        self.server.logs = self._log
        self.jobs = Jobs(self.store, self.scale)
        self._over = threading.Event()
        self._tainted_at = self._collected_at = 0.0
        self._gone: dict[str, float] = {}
        self.errors: list[str] = []
        self.kubeconfig = self.folder / "kubeconfig"
        context = {"cluster": "c", "user": "u", "namespace": "default"}
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "simulated",
            "clusters": [{"name": "c", "cluster": {"server": self.server.url}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "simulated", "context": context}]}))  # fmt: skip
        self._threads = [threading.Thread(target=self._loop, args=(what,), daemon=True)
                         for what in (self._control, self._tend)]  # fmt: skip

    @staticmethod
    @contextlib.contextmanager
    def up(folder: Path, nodes: int, scale: float = 0.05, **capacity: str) -> Iterator[Cluster]:
        made = Cluster(folder, scale)
        for number in range(nodes):
            made.add_node(f"n{number}", **capacity)
        for thread in made._threads:
            thread.start()
        try:
            yield made
        finally:
            made._over.set()
            for thread in made._threads:
                thread.join()
            for node in made.nodes.values():
                node.stop()
            made.server.close()

    def add_node(self, name: str, **capacity: str) -> None:
        room = {"cpu": "8", "memory": "64Gi", **{key.replace("_", "/"): value for key, value in capacity.items()}}
        self.nodes[name] = Node(self.store, name, self.folder / "nodes", room)

    # What a test does to it

    def evict(self, pod: Plain) -> None:
        self.server.evict(_key(pod))

    def delete(self, pod: Plain, grace_s: float | None = None) -> None:
        self.server.delete(_key(pod), {} if grace_s is None else {"gracePeriodSeconds": grace_s}, {})

    def drain(self, name: str) -> None:
        self._taint(name, "node.kubernetes.io/unschedulable", "NoSchedule")
        for pod in self.store.list("pods"):
            if pod["spec"].get("nodeName") == name and pod["status"]["phase"] == "Running":
                self.evict(pod)

    def kill_for_memory(self, pod: Plain) -> None:
        process = self.process(pod)
        process.oom = True
        process.child.kill()

    def out_of_service(self, name: str) -> None:
        self._taint(name, OUT_OF_SERVICE, "NoExecute")

    def remove_node(self, name: str) -> None:
        self.store.remove(("nodes", "", name))
        self._gone[name] = time.monotonic()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody can be asked or told: neither by us, nor by controllers and nodes."""
        self.server.away.set()
        until(lambda: self.server.listeners == 0)
        try:
            yield
        finally:
            self.server.away.clear()

    # What a test asks

    def process(self, pod: Plain) -> Process:
        return self.nodes[pod["spec"]["nodeName"]].running[pod["metadata"]["uid"]]

    def pods(self, job: str | None = None, phase: str | None = None) -> list[Plain]:
        found = self.store.list("pods", labels={} if job is None else {"job-name": job})
        return [pod for pod in found if phase in (None, pod["status"]["phase"])]

    def job(self, name: str) -> Plain:
        return self.store.get(("jobs", "default", name))

    def _log(self, namespace: str, name: str) -> str:
        pod = self.store.get(("pods", namespace, name))
        return (self.folder / "nodes" / pod["spec"]["nodeName"] / pod["metadata"]["uid"] / "log").read_text()

    # What it does by itself

    def _loop(self, work: Callable[[], None]) -> None:
        while not self._over.wait(TICK_S):
            if self.server.away.is_set():  # all of them only speak to the API server
                continue
            try:
                work()
            except ApiError as error:
                if error.code not in (404, 409):  # others may have been faster, as on any cluster
                    self.errors.append(str(error))

    def _tend(self) -> None:
        for node in self.nodes.values():
            node.tend()

    def _control(self) -> None:
        self._schedule()
        self._watch_nodes()
        self._collect()
        self.jobs.sync()

    def _schedule(self) -> None:
        for pod in self.store.list("pods"):
            if pod["spec"].get("nodeName") or "deletionTimestamp" in pod["metadata"]:
                continue
            reasons = {node["metadata"]["name"]: self._refusal(node, pod) for node in self.store.list("nodes")}
            fits = sorted(name for name, why in reasons.items() if not why)
            if fits:
                pod["spec"]["nodeName"] = min(fits, key=lambda name: len(self._on(name)))
                pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
            else:
                counts: dict[str, int] = {}
                for why in reasons.values():
                    counts[why] = counts.get(why, 0) + 1
                said = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
                message = f"0/{len(reasons)} nodes are available: {said}."
                pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                                "message": message}]  # fmt: skip
            self.store.put(_key(pod), pod)

    def _on(self, name: str) -> list[Plain]:
        return [pod for pod in self.store.list("pods") if pod["spec"].get("nodeName") == name
                and pod["status"]["phase"] in ("Pending", "Running")]  # fmt: skip

    def _refusal(self, node: Plain, pod: Plain) -> str:
        """Why the pod cannot go there; empty when it can."""
        tolerated = {each.get("key") for each in pod["spec"].get("tolerations", []) if "tolerationSeconds" not in each}
        for taint in node["spec"].get("taints", []):
            if taint["key"] not in tolerated:
                return f"node(s) had untolerated taint(s) {taint['key']}"
        labels = node["metadata"]["labels"]
        if any(labels.get(key) != value for key, value in pod["spec"].get("nodeSelector", {}).items()):
            return "node(s) didn't match Pod's node affinity/selector"
        name = node["metadata"]["name"]
        for key, wanted in _asked(pod).items():
            used = sum(_asked(other).get(key, 0.0) for other in self._on(name))
            if used + wanted > _number(node["status"]["allocatable"].get(key, "0")):
                return f"Insufficient {key}"
        return ""

    def _watch_nodes(self) -> None:
        """Of a silent node: not ready after a while, its pods not ready, then ended; one node at a time."""
        for node in self.store.list("nodes"):
            name = node["metadata"]["name"]
            taints = {each["key"]: each for each in node["spec"].get("taints", []) if each["effect"] == "NoExecute"}
            silent_s = time.monotonic() - self.nodes[name].seen
            if silent_s > NOTICE_S * self.scale and UNREACHABLE not in taints:
                self._say_ready(name, "Unknown")
                if time.monotonic() - self._tainted_at > EVICT_EVERY_S * self.scale:
                    self._tainted_at = time.monotonic()
                    self._taint(name, UNREACHABLE, "NoExecute")
                for pod in self._on(name):
                    for each in pod["status"]["conditions"]:
                        if each["type"] == "Ready":
                            each["status"] = "False"
                    self.store.put(_key(pod), pod)
            elif silent_s < NOTICE_S * self.scale and UNREACHABLE in taints:
                node["spec"]["taints"] = [each for each in node["spec"]["taints"] if each["key"] != UNREACHABLE]
                self.store.put(("nodes", "", name), node)
                self._say_ready(name, "True")
            if UNREACHABLE in taints:
                self._evict_by_taint(name, taints[UNREACHABLE]["since"])

    def _say_ready(self, name: str, status: str) -> None:
        with self.store.changed:
            node = self.store.get(("nodes", "", name))
            node["status"]["conditions"] = [{"type": "Ready", "status": status}]
            self.store.put(("nodes", "", name), node)

    def _evict_by_taint(self, name: str, since: float) -> None:
        for pod in self._on(name):
            stays = [each.get("tolerationSeconds", 300) for each in pod["spec"].get("tolerations", [])
                     if each.get("key") == UNREACHABLE]  # fmt: skip
            waited = time.monotonic() - since
            if "deletionTimestamp" not in pod["metadata"] and waited > min(stays, default=300) * self.scale:
                self.server.mark(_key(pod), "DeletionByTaintManager")
                self.server.delete(_key(pod), {}, {})

    def _collect(self) -> None:
        """Pods that hang on nodes which are declared out of service, or are gone, are declared failed."""
        if time.monotonic() - self._collected_at < COLLECT_S * self.scale:
            return
        self._collected_at = time.monotonic()
        there = {node["metadata"]["name"]: node for node in self.store.list("nodes")}
        for pod in self.pods(phase="Running"):
            name = pod["spec"]["nodeName"]
            keys = [each["key"] for each in there.get(name, {"spec": {}})["spec"].get("taints", [])]
            off = OUT_OF_SERVICE in keys and "deletionTimestamp" in pod["metadata"]
            gone = name not in there and time.monotonic() - self._gone.get(name, 0.0) > QUARANTINE_S * self.scale
            if off or gone:
                if gone:
                    self.server.mark(_key(pod), "DeletionByPodGC")
                with self.store.changed:
                    pod = self.store.get(_key(pod))
                    pod["status"]["phase"] = "Failed"
                    self.store.put(_key(pod), pod)
                    self.store.delete(_key(pod), 0)

    def _taint(self, name: str, key: str, effect: str) -> None:
        with self.store.changed:
            node = self.store.get(("nodes", "", name))
            node["spec"].setdefault("taints", []).append({"key": key, "effect": effect, "since": time.monotonic()})
            self.store.put(("nodes", "", name), node)


def _asked(pod: Plain) -> dict[str, float]:
    resources = pod["spec"]["containers"][0].get("resources", {})
    wanted = {**resources.get("limits", {}), **resources.get("requests", {})}
    return {key: _number(value) for key, value in wanted.items()}


def _number(text: str) -> float:
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * UNITS.get(unit, 1)


def _key(pod: Plain) -> tuple[str, str, str]:
    return "pods", pod["metadata"]["namespace"], pod["metadata"]["name"]

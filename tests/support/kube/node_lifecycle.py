"""What the simulated control plane does about nodes: it notices those that are silent, gives their pods up, and
declares failed what hangs on nodes that are out of service or gone."""

from __future__ import annotations

import time
from typing import Any

from support.kube.events import Events
from support.kube.object_store import Plain, Store, key_of, set_condition

NOTICE_S, EVICT_EVERY_S, COLLECT_S, QUARANTINE_S, TOLERATED_S = 50.0, 10.0, 20.0, 40.0, 300.0
SURELY_S = 2.5
"""However fast time goes, nodes and controllers share a machine that may be busy for so long."""
DOZED_S = 0.5
"""Who has not looked for so long cannot tell a silent node from his own sleep."""
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
UNREACHABLE = "node.kubernetes.io/unreachable"
CONTROLLER = "node-controller"


class Lifecycle:
    """`server` marks and ends pods as the Eviction API does; `scale`: seconds here for each of a real cluster."""

    def __init__(self, store: Store, server: Any, events: Events, scale: float) -> None:
        self.store, self.server, self.events, self.scale = store, server, events, scale
        self.notice_s = max(NOTICE_S * scale, SURELY_S)
        self._heard: dict[str, tuple[str, float]] = {}
        """Node → when its lease says it was renewed, and when that was seen here."""
        self._tainted: dict[str, float] = {}
        self._gone: dict[str, float] = {}
        self._tainted_at = self._collected_at = self._looked_at = 0.0

    def sync(self) -> None:
        now, before = time.monotonic(), self._looked_at
        self._looked_at = now
        if now - before > DOZED_S:
            self._heard = {name: (renewed, now) for name, (renewed, _) in self._heard.items()}
        leases = {each["metadata"]["name"]: each["spec"]["renewTime"]
                  for each in self.store.list("leases", "kube-node-lease")}  # fmt: skip
        for node in self.store.list("nodes"):
            name = node["metadata"]["name"]
            renewed = leases.get(name, "")
            if self._heard.get(name, ("never", 0.0))[0] != renewed:
                self._heard[name] = (renewed, now)
            self._judge(node, now - self._heard[name][1])
        self._collect(now)

    def _judge(self, node: Plain, silent_s: float) -> None:
        """Of a silent node: not ready after a while, its pods not ready, then ended; one node at a time."""
        name = node["metadata"]["name"]
        if silent_s > self.notice_s:
            if _ready(node) != "Unknown":
                self._say_ready(node, "Unknown")
            if name not in self._tainted and time.monotonic() - self._tainted_at > EVICT_EVERY_S * self.scale:
                self._tainted[name] = self._tainted_at = time.monotonic()
                self.taint(name, UNREACHABLE, "NoExecute")
            if name in self._tainted:
                self._evict(name)
        elif name in self._tainted:
            del self._tainted[name]
            with self.store.changed:
                node = self.store.get(key_of(node))
                node["spec"]["taints"] = [each for each in node["spec"]["taints"] if each["key"] != UNREACHABLE]
                self.store.put(key_of(node), node)

    def _say_ready(self, node: Plain, status: str) -> None:
        name, said = node["metadata"]["name"], {"reason": "NodeStatusUnknown", "message": "Kubelet stopped posting"}
        with self.store.changed:
            node = self.store.get(key_of(node))
            set_condition(node, {"type": "Ready", "status": status, **said})
            self.store.put(key_of(node), node)
        self.events.say(CONTROLLER, node, "Normal", "NodeNotReady", f"Node {name} status is now: NodeNotReady")
        for pod in self.store.pods_on(name):
            set_condition(pod, {"type": "Ready", "status": "False"})
            self.store.put(key_of(pod), pod)
            self.events.say(CONTROLLER, pod, "Warning", "NodeNotReady", "Node is not ready")

    def _evict(self, name: str) -> None:
        for pod in self.store.pods_on(name):
            stays = [each.get("tolerationSeconds", TOLERATED_S) for each in pod["spec"].get("tolerations", [])
                     if each.get("key") == UNREACHABLE]  # fmt: skip
            waited = time.monotonic() - self._tainted[name]
            if "deletionTimestamp" not in pod["metadata"] and waited > min(stays, default=TOLERATED_S) * self.scale:
                where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
                self.events.say("taint-eviction-controller", pod, "Normal", "TaintManagerEviction",
                                f"Marking for deletion Pod {where}")  # fmt: skip
                self.server.mark(key_of(pod), "DeletionByTaintManager")
                self.server.delete(key_of(pod), {}, {})

    def _collect(self, now: float) -> None:
        """Pods that hang on nodes which are declared out of service, or are gone, are declared failed."""
        if now - self._collected_at < COLLECT_S * self.scale:
            return
        self._collected_at = now
        there = {node["metadata"]["name"]: node for node in self.store.list("nodes")}
        for pod in self.store.list("pods"):
            name = pod["spec"].get("nodeName")
            if name is None or pod["status"]["phase"] != "Running":
                continue
            keys = [each["key"] for each in there.get(name, {"spec": {}})["spec"].get("taints", [])]
            off = OUT_OF_SERVICE in keys and "deletionTimestamp" in pod["metadata"]
            gone = name not in there and now - self._gone.setdefault(name, now) > QUARANTINE_S * self.scale
            if gone:
                self.server.mark(key_of(pod), "DeletionByPodGC")
            if off or gone:
                with self.store.changed:
                    pod = self.store.get(key_of(pod))
                    pod["status"]["phase"] = "Failed"
                    self.store.put(key_of(pod), pod)
                    self.store.delete(key_of(pod), 0)

    def taint(self, name: str, key: str, effect: str) -> None:
        with self.store.changed:
            node = self.store.get(("nodes", "", name))
            node["spec"].setdefault("taints", []).append({"key": key, "effect": effect})
            self.store.put(("nodes", "", name), node)


def _ready(node: Plain) -> str:
    conditions = node.get("status", {}).get("conditions", [])
    return next((each["status"] for each in conditions if each["type"] == "Ready"), "")

"""The scheduler of the simulated control plane: each pod goes to the emptiest node that can take it."""

from __future__ import annotations

from collections import Counter

from support.kube.events import Events
from support.kube.object_store import Plain, Store, key_of
from support.kube.quantities import number, requests


class Scheduler:
    def __init__(self, store: Store, events: Events) -> None:
        self.store, self.events = store, events

    def sync(self) -> None:
        for pod in self.store.list("pods"):
            if not pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]:
                self._place(pod)

    def _place(self, pod: Plain) -> None:
        reasons = {node["metadata"]["name"]: self._refusal(node, pod) for node in self.store.list("nodes")}
        fits = sorted(name for name, why in reasons.items() if not why)
        if fits:
            node = min(fits, key=lambda name: len(self.store.pods_on(name)))
            pod["spec"]["nodeName"] = node
            pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
            self.store.put(key_of(pod), pod)
            said = f"Successfully assigned {pod['metadata']['namespace']}/{pod['metadata']['name']} to {node}"
            return self.events.say("default-scheduler", pod, "Normal", "Scheduled", said)
        counts = Counter(reasons.values())
        said = ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))
        message = f"0/{len(reasons)} nodes are available: {said}." if reasons else "no nodes available to schedule pods"
        before = pod["status"].get("conditions")
        pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                        "message": message}]  # fmt: skip
        if pod["status"]["conditions"] != before:
            self.store.put(key_of(pod), pod)
            self.events.say("default-scheduler", pod, "Warning", "FailedScheduling", message)
        return None

    def _refusal(self, node: Plain, pod: Plain) -> str:
        """Why the pod cannot go there; empty when it can."""
        tolerated = {each.get("key") for each in pod["spec"].get("tolerations", []) if "tolerationSeconds" not in each}
        if node["spec"].get("unschedulable"):
            return "node(s) were unschedulable"
        for taint in node["spec"].get("taints", []):
            if taint["key"] not in tolerated:
                return f"node(s) had untolerated taint(s) {taint['key']}"
        labels = node["metadata"].get("labels", {})
        if any(labels.get(key) != value for key, value in pod["spec"].get("nodeSelector", {}).items()):
            return "node(s) didn't match Pod's node affinity/selector"
        others = self.store.pods_on(node["metadata"]["name"])
        for key, wanted in requests(pod).items():
            used = sum(requests(other).get(key, 0.0) for other in others)
            if used + wanted > number(node.get("status", {}).get("allocatable", {}).get(key, "0")):
                return f"Insufficient {key}"
        return ""

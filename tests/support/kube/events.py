"""Events, as the controllers of a real control plane record them: what `kubectl get events` shows."""

from __future__ import annotations

import time

from support.kube.object_store import Plain, Store, now


class Events:
    """The same words about the same object are one event, counted."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: dict[tuple[str, str, str], tuple[str, str, str]] = {}

    def say(self, who: str, about: Plain, kind: str, reason: str, message: str) -> None:
        """Args:
        who: the controller.
        about: the object. Of a node, which has no namespace, events stand in `default`.
        kind: Normal or Warning.
        """
        meta = about["metadata"]
        namespace = meta.get("namespace") or "default"
        same = (meta["uid"], reason, message)
        with self.store.changed:
            if (key := self._known.get(same)) is not None and self.store.has(key):
                event = self.store.get(key)
                event["count"], event["lastTimestamp"] = event["count"] + 1, now()
                self.store.put(key, event)
                return
            name = f"{meta['name']}.{time.time_ns():x}"
            self._known[same] = ("events", namespace, name)
            self.store.create(self._known[same], {
                "apiVersion": "v1", "kind": "Event", "metadata": {"name": name}, "type": kind, "reason": reason,
                "message": message, "count": 1, "firstTimestamp": now(), "lastTimestamp": now(),
                "source": {"component": who}, "reportingComponent": who, "reportingInstance": "",
                "involvedObject": {"apiVersion": about["apiVersion"], "kind": about["kind"], "name": meta["name"],
                                   "namespace": namespace, "uid": meta["uid"]}})  # fmt: skip

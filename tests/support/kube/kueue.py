"""What Kueue shows of a LocalQueue: the Workloads for which no quota is reserved, in the order in which they came."""

from __future__ import annotations

from support.kube.object_store import Plain, Store


def pending(store: Store, namespace: str, queue: str) -> Plain:
    waiting = [
        each for each in store.list("workloads", namespace)
        if each["spec"]["queueName"] == queue
        and any(one["type"] == "QuotaReserved" and one["status"] == "False" for one in each["status"]["conditions"])
    ]  # fmt: skip
    items = [
        {
            "metadata": {key: each["metadata"][key] for key in ("name", "ownerReferences") if key in each["metadata"]},
            "priority": 0,
            "localQueueName": queue,
            "positionInClusterQueue": place,
            "positionInLocalQueue": place,
        }
        for place, each in enumerate(sorted(waiting, key=lambda each: int(each["metadata"]["resourceVersion"])))
    ]
    return {"kind": "PendingWorkloadsSummary", "apiVersion": "visibility.kueue.x-k8s.io/v1beta2", "items": items}

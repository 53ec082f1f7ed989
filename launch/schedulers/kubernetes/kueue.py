"""Position of suspended jobs in Kueue's queues, and the reason why they wait.

The position is from Kueue's visibility API (pending workloads of a LocalQueue), the reason from the condition
QuotaReserved of the Workload that Kueue makes for each job. Both need rights that k8s/rbac.yaml grants.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from everstep.launch.schedulers.kubernetes.client import Client, Refused

Plain = dict[str, Any]
QUEUE, JOB_UID = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/job-uid"
GROUP, VISIBILITY = "kueue.x-k8s.io", "visibility.kueue.x-k8s.io"
VERSIONS = ("v1beta2", "v1beta1")
"""API versions of both groups, the newest first."""


def queued(client: Client, jobs: Iterable[Plain]) -> dict[str, str]:
    """Return uid → position and reason for each job that waits in a queue; two API calls per queue."""
    waiting = {job["metadata"]["uid"]: str(queue) for job in jobs if (queue := _queue_of(job)) is not None}
    if not waiting:
        return {}
    reasons = _reasons(client)
    found = {}
    for queue in sorted(set(waiting.values())):
        places = _places(client, queue)
        for uid in (uid for uid, name in waiting.items() if name == queue):
            said = "".join([places.get(uid, ""), f": {reasons[uid]}" if uid in reasons else ""])
            found[uid] = f"waits in queue {queue}{said}"
    return found


def _queue_of(job: Plain) -> str | None:
    if not job.get("spec", {}).get("suspend"):
        return None
    queue: str | None = (job["metadata"].get("labels") or {}).get(QUEUE)
    return queue


def _places(client: Client, queue: str) -> dict[str, str]:
    """Return uid of the job → its position; Kueue counts from 0, the message from 1."""
    items = _items(client, VISIBILITY, f"localqueues/{queue}/pendingworkloads")
    return {
        owner["uid"]: f", place {each['positionInLocalQueue'] + 1} of {len(items)}"
        for each in items
        for owner in each["metadata"].get("ownerReferences", [])
    }


def _reasons(client: Client) -> dict[str, str]:
    """Return uid of the job → the reason why no quota is reserved for it."""
    found = {}
    for each in _items(client, GROUP, "workloads"):
        for condition in each.get("status", {}).get("conditions", []):
            if condition["type"] == "QuotaReserved" and condition["status"] == "False" and condition.get("message"):
                found[each["metadata"].get("labels", {}).get(JOB_UID, "")] = condition["message"]
    return found


def _items(client: Client, group: str, what: str) -> list[Plain]:
    """Return the objects; empty if Kueue is missing, down, too old for its visibility API, or forbids it."""
    for version in VERSIONS:
        try:
            found = client.read(f"/apis/{group}/{version}/namespaces/{client.namespace}/{what}")
        except Refused:  # the name of the queue alone is useful too
            return []
        if found is not None:
            items: list[Plain] = found.get("items") or []
            return items
    return []

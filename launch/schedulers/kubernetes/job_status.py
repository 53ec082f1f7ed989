"""Status of a job from its API objects: Job, pods, events, and its place in Kueue's queues; pure."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from everstep.launch import console as text_tables
from everstep.launch.schedulers.job import JobState, JobStatus
from everstep.launch.schedulers.kubernetes.client import Client, Refused
from everstep.launch.schedulers.kubernetes.labels import COMPLETION_INDEX, TOKEN

Plain = dict[str, Any]
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
COUNTED = "batch.kubernetes.io/job-index-failure-count"
FIRST_DELAY_S = 10
LONGEST_DELAY_S = 600
FAILED = ("FailureTarget", "Failed")
NO_POD = "no pod runs yet"
SETTLED_S = 5.0
"""Seconds in which a new job normally gets its pods."""
FAILED_CREATE = "FailedCreate"
QUOTA = re.compile(r"exceeded quota: (\S+), requested: (\S+), used: (\S+), limited: (\S+)")
PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError")


def standing(
    job: Plain, pods: Sequence[Plain], restart_delay_s: int = 120, queued: str = "", events: Sequence[Plain] = ()
) -> JobStatus:
    """Return the status of a Job from its pods; of a JobSet or TrainJob from their conditions.

    Args:
        queued: status of the job in its queue.
        events: events of the job; they give the reason for missing pods.
    """
    status = job.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions", []) if each.get("status") == "True"}
    state, reason = _state(job, conditions, pods, restart_delay_s)
    if state is JobState.pending and job.get("spec", {}).get("suspend"):
        reason = queued or f"suspended: {conditions.get('Suspended', {}).get('message', 'nobody has started it yet')}"
    if not state.is_over and (refused := why_refused(job, pods, events)):
        reason = refused if reason in ("", NO_POD) else f"{refused}; {reason}"
    lost = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
    worn = "" if state.is_over else _worn(pods, restart_delay_s)
    return JobStatus(
        state=state,
        reason="; ".join(why for why in (worn and f"{worn}, everstep resume makes a new job", reason) if why),
        nodes=tuple(sorted({pod["spec"]["nodeName"] for pod in living(pods) if pod["spec"].get("nodeName")})),
        restarts=max(len(lost), sum(_failures(pod) for pod in living(pods))),
        submitted_at=_time(job["metadata"].get("creationTimestamp")),
        started_at=_time(status.get("startTime")),
        ended_at=_ended(conditions) if state.is_over else None,
        exit_code={JobState.succeeded: 0, JobState.failed: 1}.get(state),
        worn=worn,
        token=job["metadata"].get("labels", {}).get(TOKEN, ""),
    )


def _state(job: Plain, conditions: dict[str, Plain], pods: Sequence[Plain], delay_s: int) -> tuple[JobState, str]:
    if "Complete" in conditions or "Completed" in conditions or "SuccessCriteriaMet" in conditions:
        return JobState.succeeded, ""
    for kind in FAILED:
        if kind in conditions:
            return JobState.failed, _why_failed(conditions[kind], pods)
    if job["metadata"].get("deletionTimestamp"):
        return JobState.cancelled, "being removed"
    if job.get("spec", {}).get("suspend"):
        return JobState.pending, ""
    alive = living(pods)
    if any(pod["status"].get("phase") == "Running" for pod in alive):
        return JobState.running, _trouble(alive, delay_s)
    if not alive and _ended_well(pods):  # the job is done, and its own status follows a second or two later
        return JobState.running, ""
    return JobState.pending, _trouble(alive, delay_s) or NO_POD


def lacks_pods(job: Plain, pods: Sequence[Plain], now: float) -> bool:
    """True if the job has fewer pods than it should, so that its events are worth a query."""
    spec, status = job.get("spec", {}), job.get("status") or {}
    started = _time(status.get("startTime"))
    if started is None or now - started < SETTLED_S or status.get("completionTime") or spec.get("suspend"):
        return False
    if any(each["type"] in FAILED and each.get("status") == "True" for each in status.get("conditions", [])):
        return False
    return len(living(pods)) < int(spec.get("parallelism", 0)) - len(_ended_well(pods))


def why_refused(job: Plain, pods: Sequence[Plain], events: Sequence[Plain]) -> str:
    """Return why Kubernetes could not create a pod, which only an event of the job shows.

    Empty if none was refused since the newest pod was created.
    """
    ours = [
        event
        for event in events
        if event.get("reason") == FAILED_CREATE and event["involvedObject"].get("uid") == job["metadata"].get("uid")
    ]
    newest = max(ours, key=_said_at, default=None)
    if newest is None or any((_time(pod["metadata"].get("creationTimestamp")) or 0) > _said_at(newest) for pod in pods):
        return ""
    said = str(newest.get("message", ""))
    if (found := QUOTA.search(said)) is not None:
        name, asked, used, limit = found.groups()
        return f"waits for quota {name} (requested: {asked}, used: {used}, limited: {limit})"
    return f"no pod can be made: {said.removeprefix('Error creating: ')}"


def _said_at(event: Plain) -> float:
    """Return the time of the last occurrence; a newer event type counts repeats in its `series`."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((at for time in times if (at := _time(time)) is not None), 0.0)


def _ended_well(pods: Sequence[Plain]) -> list[Plain]:
    return [pod for pod in pods if pod.get("status", {}).get("phase") == "Succeeded"]


def _why_failed(condition: Plain, pods: Sequence[Plain]) -> str:
    """Return the last output of the pod that ended the job, else the message of Kubernetes."""
    words = [word for pod in pods if (word := last_words(pod))]
    said = f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return f"{words[-1]} ({said})" if words else said


def last_words(pod: Plain) -> str:
    """Return the last line of the supervisor in a pod that must not be tried again."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated", {})
        if ended.get("exitCode") not in (None, 0, 75, 143) and ended.get("message"):
            return str(ended["message"]).strip().splitlines()[-1]
        if ended.get("reason") == "OOMKilled":
            return f"pod {pod['metadata']['name']} was killed for its memory; change job.mem"
    return ""


def _trouble(pods: Sequence[Plain], delay_s: int) -> str:
    """Return why single pods do not run: each reason once, with the indexes that have it."""
    reasons: dict[str, list[str]] = {}
    for pod in pods:
        if why := pending_reason(pod):
            reasons.setdefault(why, []).append(index_of(pod))
    for pod in pods:
        if (delay := next_delay_s(pod)) > delay_s:
            after = text_tables.duration(delay)
            why = f"would be started again only after {after}; everstep resume would then make a new job"
            reasons.setdefault(why, []).append(index_of(pod))
    return "; ".join(f"pod {', '.join(indexes)}: {why}" for why, indexes in reasons.items())


def _worn(pods: Sequence[Plain], limit_s: int) -> str:
    """Return the pods whose next start Kubernetes delays beyond the limit; empty if there are none."""
    present = {index_of(pod) for pod in pods if pod.get("status", {}).get("phase") != "Failed"}
    # The newest pod of each index: its annotations count all failures before it.
    lost = {index_of(pod): pod for pod in sorted(pods, key=_failures) if index_of(pod) not in present}
    waits = {index: wait_s for index, pod in lost.items() if (wait_s := _wait_s(pod)) > limit_s}
    if not waits:
        return ""
    return f"pod {', '.join(waits)}: is started again only in {text_tables.duration(max(waits.values()))}"


def _wait_s(pod: Plain) -> float:
    """Return the seconds until a failed pod is replaced."""
    containers = pod.get("status", {}).get("containerStatuses", [])
    ends = [_time(each.get("state", {}).get("terminated", {}).get("finishedAt")) for each in containers]
    ended = max((end for end in ends if end is not None), default=time.time())
    return ended + next_delay_s(pod) - time.time()


def pending_reason(pod: Plain) -> str:
    """Return why a pod waits or hangs; empty for a healthy one."""
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp") and status.get("phase") == "Running":
        ready = [each for each in status.get("conditions", []) if each["type"] == "Ready"]
        if any(each["status"] != "True" for each in ready):
            return (
                f"hangs in Terminating on lost node {pod['spec'].get('nodeName')}; taint the node with "
                "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute once it is off"
            )
        return "is being ended"
    if status.get("phase") != "Pending":
        return ""
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in PULL:
            key = "job.k8s" if "Config" in waiting["reason"] else "job.image"
            return f"{waiting['reason']}: {waiting.get('message', container.get('image', ''))}; change {key}"
    for each in status.get("conditions", []):
        if each["type"] == "PodScheduled" and each["status"] == "False":
            return f"{each.get('reason', 'Unschedulable')}: {each.get('message', '')}"
    return ""


def next_delay_s(pod: Plain) -> int:
    """Return the seconds that Kubernetes would wait before it starts this index again.

    Each failure doubles them, ignored ones too, and a long run without failure does not reset them.
    """
    failures = _failures(pod)
    return int(min(FIRST_DELAY_S * 2**failures, LONGEST_DELAY_S))


def _failures(pod: Plain) -> int:
    annotations = pod["metadata"].get("annotations") or {}
    return sum(int(annotations.get(key, 0)) for key in (IGNORED, COUNTED))


def index_of(pod: Plain) -> str:
    return str((pod["metadata"].get("annotations") or {}).get(COMPLETION_INDEX, pod["metadata"]["name"]))


def living(pods: Iterable[Plain]) -> list[Plain]:
    """Return the pods that wait or run, by index."""
    found = [pod for pod in pods if pod.get("status", {}).get("phase") in ("Pending", "Running")]
    return sorted(found, key=lambda pod: (len(index_of(pod)), index_of(pod)))


def _ended(conditions: dict[str, Plain]) -> float | None:
    times = [_time(each.get("lastTransitionTime")) for each in conditions.values()]
    return max((time for time in times if time is not None), default=None)


def _time(value: str | None) -> float | None:
    return None if value is None else datetime.datetime.fromisoformat(value).timestamp()


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

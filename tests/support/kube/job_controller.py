"""The Job controller of the simulated control plane: what a real 1.36 was seen to do, with all times scaled."""

from __future__ import annotations

import copy
import datetime
from typing import Any

from support.kube.events import Events
from support.kube.object_store import TRACKING, ApiError, Plain, Store, key_of, now
from support.kube.quota import Quotas

INDEX = "batch.kubernetes.io/job-completion-index"
COUNTED = "batch.kubernetes.io/job-index-failure-count"
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
BACK_OFF_S, LONGEST_S = 10.0, 600.0
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
"""Between two tries to create a pod that was refused."""
CONTROLLER = "job-controller"
FOREGROUND = "foregroundDeletion"


def age_s(time: str) -> float:
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(time)).total_seconds()


class Jobs:
    """`scale`: seconds here for each second of a real cluster."""

    def __init__(self, store: Store, events: Events, scale: float) -> None:
        self.store, self.events, self.scale, self.quotas = store, events, scale, Quotas(store)
        self._ended: dict[str, dict[int, Plain]] = {}
        """Job's uid → index → its last pod that failed: the next one inherits its counts."""
        self._failed: dict[str, dict[int, int]] = {}
        self._done: dict[str, set[int]] = {}
        self._made = 0
        self._accounted: set[str] = set()
        """Pods that have failed and were looked at: they stay until their index has another."""
        self._refused: dict[str, tuple[int, str]] = {}
        """Job's uid → how often in a row a pod of it was refused, and when last: it is asked again ever more seldom."""
        self._excused: set[str] = set()
        """Pods that a suspension has ended: they count nowhere."""

    def sync(self) -> None:
        self.quotas.sync()
        for job in self.store.list("jobs"):
            key = ("jobs", job["metadata"]["namespace"], job["metadata"]["name"])
            with self.store.changed:
                try:
                    job = self.store.get(key)
                    before = copy.deepcopy(job)
                    self._sync(job)
                    if job != before:
                        self.store.put(key, job)
                except ApiError:
                    continue

    def _pods(self, job: Plain) -> list[Plain]:
        uid = job["metadata"]["uid"]
        return [pod for pod in self.store.list("pods", job["metadata"]["namespace"])
                if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", []))]  # fmt: skip

    def _sync(self, job: Plain) -> None:
        status, spec = job["status"], job["spec"]
        uid = job["metadata"]["uid"]
        pods = self._pods(job)
        if job["metadata"].get("deletionTimestamp"):
            return self._go(job, pods)
        for pod in pods:
            if pod["status"]["phase"] in ("Succeeded", "Failed") and TRACKING in pod["metadata"].get("finalizers", []):
                self._account(job, pod)
        if _has(job, "FailureTarget") or _has(job, "SuccessCriteriaMet"):
            self._release(pods)
        pods = self._pods(job)
        active = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
        if _has(job, "Complete") or _has(job, "Failed"):
            return None
        self._count(job, active)
        if spec.get("suspend"):
            return self._suspend(job, active)
        if "startTime" not in status:
            status["startTime"] = now()
            if _has(job, "Suspended"):
                self.events.say(CONTROLLER, job, "Normal", "Resumed", "Job resumed")
            status["conditions"] = [each for each in status.get("conditions", []) if each["type"] != "Suspended"]
        self._targets(job)
        target = _has(job, "FailureTarget") or _has(job, "SuccessCriteriaMet")
        if target:
            self._end(job, active)
            if not active:
                self._finish(job, target)
                _set(job, "Failed" if target["type"] == "FailureTarget" else "Complete", target["reason"],
                     target.get("message", ""))  # fmt: skip
            return None
        for index in range(spec["completions"]):
            if index < spec["parallelism"]:
                self._replace(job, index, pods)
        self._end(job, [pod for pod in active if int(pod["metadata"]["annotations"][INDEX]) >= spec["completions"]])
        self._failed.setdefault(uid, {})
        return None

    def _go(self, job: Plain, pods: list[Plain]) -> None:
        """Removal in the foreground: pods first, then what is owned, then the job."""
        for pod in pods:
            if pod["status"]["phase"] in ("Succeeded", "Failed"):
                pod["metadata"]["finalizers"] = []
                self.store.put(key_of(pod), pod)
        self._end(job, pods)
        if self._pods(job):
            return
        going = {job["metadata"]["uid"]}
        for plural in ("services", "networkpolicies", "configmaps", "secrets"):  # a secret belongs to the settings
            for each in self.store.list(plural, job["metadata"]["namespace"]):
                owners = each["metadata"].get("ownerReferences", [])
                if any(owner["uid"] in going for owner in owners):
                    going.add(each["metadata"]["uid"])
                    self.store.remove((plural, job["metadata"]["namespace"], each["metadata"]["name"]))
        job["metadata"]["finalizers"] = []

    def _account(self, job: Plain, pod: Plain) -> None:
        """A pod that has ended is looked at once. One that has failed then stays, with its finalizer, until the next of
        its index has taken over its counts."""
        uid, index = job["metadata"]["uid"], int(pod["metadata"]["annotations"][INDEX])
        if pod["metadata"]["uid"] in self._accounted:
            return
        if pod["status"]["phase"] == "Succeeded":
            self._done.setdefault(uid, set()).add(index)
            self._release([pod])
        elif pod["metadata"]["uid"] in self._excused:
            self._release([pod])
        else:
            self._accounted.add(pod["metadata"]["uid"])
            notes = dict(pod["metadata"]["annotations"])
            action, message = _action(job, pod)
            which = IGNORED if action == "Ignore" else COUNTED
            notes[which] = str(int(notes.get(which, 0)) + 1)
            self._ended.setdefault(uid, {})[index] = {"at": now(), "notes": notes}
            self._failed.setdefault(uid, {})[index] = int(notes.get(COUNTED, 0))
            if action == "FailIndex":
                self._failed[uid][index] = 10**9
            if action == "FailJob":
                _set(job, "FailureTarget", "PodFailurePolicy", message)
            if index in self._out_of_budget(job):
                self._release([pod])

    def _release(self, pods: list[Plain]) -> None:
        """Let go of those that have ended: one that was deleted is gone then."""
        for pod in pods:
            if pod["status"]["phase"] in ("Succeeded", "Failed") and TRACKING in pod["metadata"].get("finalizers", []):
                pod["metadata"]["finalizers"] = [each for each in pod["metadata"]["finalizers"] if each != TRACKING]
                self.store.put(key_of(pod), pod)

    def _count(self, job: Plain, active: list[Plain]) -> None:
        uid = job["metadata"]["uid"]
        going = [pod for pod in active if "deletionTimestamp" in pod["metadata"]]
        job["status"] |= {
            "terminating": len(going),
            "ready": sum(_ready(pod) for pod in active),
            "failedIndexes": ",".join(map(str, self._out_of_budget(job))),
        }
        named = {
            "active": len(active) - len(going),
            "failed": sum(count for count in self._failed.get(uid, {}).values()),
            "completedIndexes": ",".join(map(str, sorted(self._done.get(uid, set())))),
        }
        for name, value in named.items():  # these stand there only if there is something to say
            job["status"].pop(name, None)
            job["status"].update({name: value} if value else {})

    def _out_of_budget(self, job: Plain) -> list[int]:
        limit = job["spec"].get("backoffLimitPerIndex", 6)
        failed = self._failed.get(job["metadata"]["uid"], {})
        return sorted(index for index, count in failed.items() if count > limit)

    def _suspend(self, job: Plain, active: list[Plain]) -> None:
        self._excused |= {pod["metadata"]["uid"] for pod in active}
        self._end(job, active)
        if not _has(job, "Suspended"):
            self.events.say(CONTROLLER, job, "Normal", "Suspended", "Job suspended")
            _set(job, "Suspended", "JobSuspended", "Job suspended")
            job["status"].pop("startTime", None)

    def _targets(self, job: Plain) -> None:
        """Whether the job is to end, and how."""
        if _has(job, "FailureTarget") or _has(job, "SuccessCriteriaMet"):
            return
        spec, done = job["spec"], self._done.get(job["metadata"]["uid"], set())
        failed = self._out_of_budget(job)
        limit = spec.get("activeDeadlineSeconds")
        if limit is not None and age_s(job["status"]["startTime"]) > limit * self.scale:
            _set(job, "FailureTarget", "DeadlineExceeded", "Job was active longer than specified deadline")
        elif len(failed) > spec.get("maxFailedIndexes", 10**9):
            _set(job, "FailureTarget", "MaxFailedIndexesExceeded", "Job has exceeded the specified maximal number of "
                 "failed indexes")  # fmt: skip
        elif any(_indexes(rule["succeededIndexes"]) <= done for rule in spec.get("successPolicy", {}).get("rules", [])):
            _set(job, "SuccessCriteriaMet", "SuccessPolicy", "Matched rules at index 0")
        elif len(done) + len(failed) >= spec["completions"]:
            kind = "FailureTarget" if failed else "SuccessCriteriaMet"
            _set(job, kind, "FailedIndexes" if failed else "CompletionsReached", "")

    def _replace(self, job: Plain, index: int, pods: list[Plain]) -> None:
        """A pod for an index that has none: after its back-off, and never beside one that still ends."""
        uid = job["metadata"]["uid"]
        if index in self._done.get(uid, set()) or index in self._out_of_budget(job):
            return
        mine = [pod for pod in pods if int(pod["metadata"]["annotations"][INDEX]) == index]
        if any(pod["status"]["phase"] in ("Pending", "Running") for pod in mine):
            return
        last = self._ended.get(uid, {}).get(index)
        inherited = {} if last is None else last["notes"]
        notes = {key: value for key, value in inherited.items() if key in (COUNTED, IGNORED)}
        failures = sum(int(value) for value in notes.values())
        wait_s = min(BACK_OFF_S * 2 ** (failures - 1), LONGEST_S) if failures else 0.0
        if last is not None and age_s(last["at"]) < wait_s * self.scale:
            return
        times, at = self._refused.get(uid, (0, now()))
        if times and age_s(at) < min(RETRY_S * 2**times, LONGEST_RETRY_S) * self.scale:
            return
        if self._create(job, index, {COUNTED: "0", **notes}):
            self._release(mine)

    def _create(self, job: Plain, index: int, notes: dict[str, str]) -> bool:
        template, meta = copy.deepcopy(job["spec"]["template"]), job["metadata"]
        self._made += 1
        name = f"{meta['name']}-{index}-{self._made:05x}"
        labels = {**template["metadata"].get("labels", {}), "job-name": meta["name"],
                  "batch.kubernetes.io/job-name": meta["name"], INDEX: str(index)}  # fmt: skip
        annotations = {**template["metadata"].get("annotations", {}), INDEX: str(index), **notes}
        spec = {**template["spec"], "hostname": f"{meta['name']}-{index}"}
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
        pod = {"apiVersion": "v1", "kind": "Pod", "spec": spec, "status": {"phase": "Pending", "conditions": []},
               "metadata": {"name": name, "labels": labels, "annotations": annotations, "finalizers": [TRACKING],
                            "namespace": meta["namespace"], "ownerReferences": [owner]}}  # fmt: skip
        try:
            self.quotas.check(pod)
        except ApiError as error:
            self._refused[meta["uid"]] = (self._refused.get(meta["uid"], (0, ""))[0] + 1, now())
            self.events.say(CONTROLLER, job, "Warning", "FailedCreate", f"Error creating: {error}")
            return False
        self._refused.pop(meta["uid"], None)
        self.store.create(key_of(pod), pod)
        self.events.say(CONTROLLER, job, "Normal", "SuccessfulCreate", f"Created pod: {name}")
        return True

    def _finish(self, job: Plain, target: Plain) -> None:
        if target["type"] == "FailureTarget":
            self.events.say(CONTROLLER, job, "Warning", target["reason"], target.get("message", ""))
        else:
            self.events.say(CONTROLLER, job, "Normal", "Completed", "Job completed")

    def _end(self, job: Plain, pods: list[Plain]) -> None:
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                said = f"Deleted pod: {pod['metadata']['name']}"
                self.events.say(CONTROLLER, job, "Normal", "SuccessfulDelete", said)
                grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
                gone = self.store.delete(key_of(pod), grace)
                if not pod["spec"].get("nodeName"):  # it never ran, so nobody else will end it
                    gone["status"]["phase"] = "Failed"
                    gone["metadata"]["finalizers"] = []
                    self.store.put(key_of(pod), gone)


def _action(job: Plain, pod: Plain) -> tuple[str, str]:
    """Of the first rule of podFailurePolicy that fits, with Kubernetes' own words for FailJob."""
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", [])}
    for number, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", [])):
        for wanted in rule.get("onPodConditions", []):
            if conditions.get(wanted["type"]) == wanted.get("status", "True"):
                said = f"Pod {_named(pod)} has condition {wanted['type']} matching rule at index {number}"
                return rule["action"], said
        codes = rule.get("onExitCodes")
        for container in pod["status"].get("containerStatuses", []) if codes else []:
            code = container["state"].get("terminated", {}).get("exitCode")
            fits = code not in (None, 0) and (code in codes["values"]) == (codes["operator"] == "In")
            if fits and codes.get("containerName", container["name"]) == container["name"]:
                said = f"Container {container['name']} for pod {_named(pod)} failed with exit code {code} matching "
                return rule["action"], f"{said}{rule['action']} rule at index {number}"
    return "Count", ""


def _named(pod: Plain) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"


def _ready(pod: Plain) -> bool:
    return any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", []))


def _indexes(text: str) -> set[int]:
    found: set[int] = set()
    for word in text.split(","):
        first, _, last = word.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _has(job: Plain, kind: str) -> Any:
    return next((each for each in job["status"].get("conditions", []) if each["type"] == kind), None)


def _set(job: Plain, kind: str, reason: str, message: str) -> None:
    job["status"].setdefault("conditions", []).append(
        {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": now()}
    )

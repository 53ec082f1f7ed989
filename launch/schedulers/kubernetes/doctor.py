"""Checks of a cluster for one job, by few API calls; one finding per line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from everstep.errors import ConfigError
from everstep.launch import console as text
from everstep.launch.config import JobConfig
from everstep.launch.finding import Finding
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.kubernetes import rbac
from everstep.launch.schedulers.kubernetes.capacity import PodRequest, against_nodes, against_quotas, on_demand
from everstep.launch.schedulers.kubernetes.client import KINDS, RETRY_S, Client, Refused
from everstep.launch.schedulers.kubernetes.job_status import index_of, living, next_delay_s
from everstep.launch.schedulers.kubernetes.labels import JOB_NAME, JOBSET_NAME, MANAGER
from everstep.launch.schedulers.kubernetes.manifest import objects

Plain = dict[str, Any]
OUT_OF_SERVICE = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
KUEUE = "kueue.x-k8s.io"
SHARED = {"ReadWriteMany", "ReadOnlyMany"}
"""Access modes of claims that pods on several nodes can mount."""


class Doctor:
    """Checks of a cluster for one job.

    Raises:
        ConfigError: the API server cannot be reached.
    """

    def __init__(self, job: JobConfig, retry_s: float = RETRY_S) -> None:
        self.job = job
        self.client = Client(job.k8s.context, job.k8s.namespace, retry_s)
        self.here = f"/api/v1/namespaces/{self.client.namespace}"
        program = Program("everstep-doctor", "memory://everstep-doctor", (), "doctor")
        self.asked = PodRequest(job, objects(job, program)[-1])

    def findings(self) -> Iterator[Finding]:
        yield from self._reach()
        yield from self._rights()
        yield from self._extensions()
        yield from self._quotas()
        yield from self._claims()
        nodes = self._nodes()
        if nodes is not None:
            yield from self._room(nodes)
        else:
            yield Finding("nodes", "may not be listed by this account; k8s/rbac-nodes.yaml allows it", None)
        yield from self._pods(nodes)

    def take_out_of_service(self, name: str) -> Finding:
        """Mark a lost machine as off for good, so that its pods are evicted; ConfigError if the node is ready."""
        path = f"/api/v1/nodes/{name}"
        node = self.client.read(path)
        if node is None:
            raise ConfigError(f"--out-of-service {name}: there is no such node")
        if not _is_lost(node):
            raise ConfigError(f"--out-of-service {name}: it is ready, and its pods would go on beside their successors")
        taints = [each for each in node["spec"].get("taints") or [] if each["key"] != OUT_OF_SERVICE["key"]]
        # With the version, the server refuses the patch if another client has changed the node meanwhile.
        version = node["metadata"]["resourceVersion"]
        self.client.change(
            path, {"metadata": {"resourceVersion": version}, "spec": {"taints": [*taints, OUT_OF_SERVICE]}}
        )
        key = OUT_OF_SERVICE["key"]
        return Finding("lost nodes", f"{name} is out of service; once it is back: kubectl taint node {name} {key}-")

    def _reach(self) -> Iterator[Finding]:
        version = self.client.read("/version") or {}
        where = f"{self.client.server}, Kubernetes {version.get('gitVersion', '?')}"
        yield Finding("server", where)
        try:
            there = self.client.read(self.here) is not None
        except Refused:  # most accounts may not read it
            return
        if not there:
            yield Finding(
                "namespace", f"there is no namespace {self.client.namespace}; change job.k8s.namespace", False
            )

    def _rights(self) -> Iterator[Finding]:
        namespace = self.client.namespace
        told = self._review(rbac.rules_review(namespace))
        unsure = [right for right in rbac.needed() if not rbac.covers(told.get("resourceRules", []), right)]
        refused = [right for right in unsure if not self._review(rbac.review(namespace, right)).get("allowed")]
        remedy = f"kubectl apply -n {namespace} -f k8s/rbac.yaml, or change job.k8s.context or job.k8s.namespace"
        found = (f"this account may not {what}; {remedy}" for what in rbac.missing(refused))
        yield from _told("permissions", found, f"all that the launcher needs in namespace {namespace}")

    def _review(self, question: Plain) -> Plain:
        plural = f"{question['kind'].lower()}s"
        status: Plain = self.client.create(f"/apis/{question['apiVersion']}/{plural}", question)["status"]
        return status

    def _extensions(self) -> Iterator[Finding]:
        """Yield findings about JobSet, TrainJob, Kueue and its queue, which are not part of Kubernetes."""
        kind, queue = self.asked.main["kind"], self.job.queue
        if kind == "Job" and queue is None:
            return
        groups = (self.client.read("/apis") or {}).get("groups", [])
        known = {each["name"]: [version["version"] for version in each["versions"]] for each in groups}
        group, version, _ = KINDS[kind]
        if version not in known.get(group, []):
            yield Finding(
                "job.kind", f"this cluster has no {kind} ({group}/{version}); install it, or change job.kind", False
            )
        elif kind != "Job":
            yield Finding("job.kind", f"{kind} is installed")
        if queue is not None and not known.get(KUEUE):
            yield Finding(
                "job.queue", "this cluster has no Kueue: the job would wait for ever; leave out job.queue", False
            )
        elif queue is not None:
            yield self._queue(queue, known[KUEUE][0])

    def _queue(self, queue: str, version: str) -> Finding:
        path = f"/apis/{KUEUE}/{version}/namespaces/{self.client.namespace}/localqueues/{queue}"
        try:
            found = self.client.read(path)
        except Refused as error:
            return Finding("job.queue", f"queue {queue} could not be looked at: {error}", None)
        if found is None:
            return Finding(
                "job.queue", f"there is no queue {queue} in namespace {self.client.namespace}; change job.queue", False
            )
        for each in found.get("status", {}).get("conditions", []):
            if each["type"] == "Active" and each["status"] != "True":
                return Finding(
                    "job.queue", f"queue {queue} starts nothing: {each.get('message', '')}; change job.queue", False
                )
        return Finding("job.queue", f"queue {queue} is there")

    def _quotas(self) -> Iterator[Finding]:
        try:
            quotas = self.client.items(f"{self.here}/resourcequotas")
        except Refused:
            yield Finding("quota", "may not be listed by this account; k8s/rbac.yaml allows it", None)
            return
        yield from _told("quota", against_quotas(self.asked, quotas), "leaves room" if quotas else "there is none")

    def _claims(self) -> Iterator[Finding]:
        keys = {claim: f"job.k8s.claims.{claim}" for claim in self.job.k8s.claims}
        if self.job.k8s.cache_claim is not None:
            keys[self.job.k8s.cache_claim] = "job.k8s.cache_claim"
        if not keys:
            return
        try:
            there = {
                each["metadata"]["name"]: each for each in self.client.items(f"{self.here}/persistentvolumeclaims")
            }
        except Refused:
            yield Finding("claims", "may not be listed by this account; k8s/rbac.yaml allows it", None)
            return
        for claim, key in keys.items():
            wrong = self._claim(claim, there.get(claim))
            yield Finding("claims", f"{key}: {wrong}; change {key}" if wrong else f"{claim} is there", not wrong)

    def _claim(self, name: str, claim: Plain | None) -> str:
        """Return why pods could not mount the claim; empty if they could."""
        if claim is None:
            return f"there is no claim {name} in namespace {self.client.namespace}"
        spec, phase = claim["spec"], claim.get("status", {}).get("phase")
        if self.job.node_range[1] > 1 and not SHARED & set(spec.get("accessModes", [])):
            return f"claim {name} is {', '.join(spec.get('accessModes', []))}: pods on several nodes cannot mount it"
        if phase == "Lost":
            return f"the volume of claim {name} is gone"
        storage = spec.get("storageClassName")
        if phase == "Pending" and storage:
            try:
                found = self.client.read(f"/apis/storage.k8s.io/v1/storageclasses/{storage}")
            except Refused:
                return ""
            return "" if found is not None else f"claim {name} waits for storage class {storage}, which is not there"
        return ""

    def _nodes(self) -> list[Plain] | None:
        try:
            return self.client.items("/api/v1/nodes")
        except Refused:
            return None

    def _room(self, nodes: list[Plain]) -> Iterator[Finding]:
        found = list(against_nodes(self.asked, nodes))
        maker = on_demand(self.job, nodes, self.client) if found else None
        if maker is None:
            yield from _told("nodes", iter(found), f"{len(nodes)}, with room for the job")
        else:
            yield from (Finding("nodes", f"{line} ({maker})", None) for line in found)

    def _pods(self, nodes: list[Plain] | None) -> Iterator[Finding]:
        """Yield findings about our pods on lost nodes, and the back-off of each index before its next start."""
        pods = self.client.list("Pod", {"app.kubernetes.io/managed-by": MANAGER})
        yield from _told("lost nodes", _hanging(pods, nodes), "no pod of ours hangs on one")
        jobs: dict[str, list[Plain]] = {}
        for pod in living(pods):
            labels = pod["metadata"].get("labels") or {}
            jobs.setdefault(labels.get(JOBSET_NAME) or labels.get(JOB_NAME, "?"), []).append(pod)
        for name, group in jobs.items():
            yield self._delays(name, group)

    def _delays(self, name: str, pods: list[Plain]) -> Finding:
        delays = {index_of(pod): next_delay_s(pod) for pod in pods}
        told = ", ".join(f"{index} {text.duration(delay)}" for index, delay in delays.items())
        most = self.job.k8s.restart_delay_s
        remedy = "; when one is lost, everstep resume makes a new job" if max(delays.values()) > most else ""
        return Finding("restarts", f"{name}: pods would be started again after: {told}{remedy}", not remedy)


def _told(about: str, wrong: Iterator[str], fine: str) -> Iterator[Finding]:
    found = [Finding(about, line, False) for line in wrong]
    yield from found or [Finding(about, fine)]


def _hanging(pods: list[Plain], nodes: list[Plain] | None) -> Iterator[str]:
    """Yield a line per lost node; an account that may not list nodes judges by the state of the pods."""
    lost = {each["metadata"]["name"] for each in nodes or [] if _is_lost(each)}
    hanging: dict[str, list[str]] = {}
    for pod in pods:
        if pod["metadata"].get("deletionTimestamp") and pod.get("status", {}).get("phase") == "Running":
            node = pod["spec"].get("nodeName", "?")
            if node in lost or (nodes is None and not _is_ready(pod)):
                hanging.setdefault(node, []).append(pod["metadata"]["name"])
    for node, names in hanging.items():
        taint = f"{OUT_OF_SERVICE['key']}={OUT_OF_SERVICE['value']}:{OUT_OF_SERVICE['effect']}"
        yield (
            f"{', '.join(names)} hang in Terminating on {node}, and deleting them by force does not help; once the "
            f"machine is off: everstep doctor job=k8s --out-of-service {node} (taint {taint})"
        )


def _is_lost(node: Plain) -> bool:
    return not _is_ready(node)


def _is_ready(thing: Plain) -> bool:
    """True if the condition Ready of a node or pod is true."""
    conditions = thing.get("status", {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

"""Capacity of a cluster for a job: quotas, nodes, and nodes that are made on demand; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from everstep.launch.config import JobConfig
from everstep.launch.schedulers.kubernetes.client import Client, Refused
from everstep.launch.schedulers.kubernetes.pod import Plain
from everstep.launch.schedulers.kubernetes.validate import amount

HOST = "kubernetes.io/hostname"
PASSING = "node.kubernetes.io/"
"""Prefix of taints of nodes that are not ready, full or cordoned: they come and go."""

COUNTED = ("pods", "jobs.batch", "services", "configmaps")


@dataclass(frozen=True)
class PodRequest:
    """A job's requests to a cluster."""

    job: JobConfig
    main: Plain
    """The Job, JobSet or TrainJob, overlay included."""

    @property
    def pod(self) -> Plain:
        """Spec of the pods; for a TrainJob our part of it."""
        spec: Plain = self.main["spec"]
        if self.main["kind"] == "TrainJob":
            jobs = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
            patch: Plain = jobs[0]["template"]["spec"]["template"]["spec"]
            return {**patch, "containers": [{"resources": spec["trainer"].get("resourcesPerNode", {})}]}
        if self.main["kind"] == "JobSet":
            spec = spec["replicatedJobs"][0]["template"]["spec"]
        found: Plain = spec["template"]["spec"]
        return found

    def sums(self, which: str) -> dict[str, float]:
        """Return the `requests` or `limits` of one pod; a limit without a request is also the request."""
        found: dict[str, float] = {}
        for container in self.pod.get("containers", []):
            resources = container.get("resources", {})
            given = {**resources.get("limits", {}), **(resources.get("requests", {}) if which == "requests" else {})}
            for name, quantity in given.items():
                found[name] = found.get(name, 0.0) + (amount(quantity) or 0.0)
        return found

    def key(self, resource: str) -> str:
        """Return the config key that lowers the request for a resource."""
        k8s = self.job.k8s
        keys = {"cpu": "job.cpus", "memory": "job.mem", k8s.gpu_resource: "job.gpus"}
        return {**keys, str(k8s.rdma_resource): "job.k8s.rdma_count"}.get(resource, "job.k8s.overlay")


def against_quotas(asked: PodRequest, quotas: Sequence[Plain]) -> Iterator[str]:
    """Yield a line for each quota that leaves less than the minimum number of pods needs."""
    for quota in quotas:
        hard, used = quota.get("status", {}).get("hard", {}), quota.get("status", {}).get("used", {})
        if quota.get("spec", {}).get("scopes") or quota.get("spec", {}).get("scopeSelector"):
            continue  # it applies only to some pods, which only the server can select
        name = quota["metadata"]["name"]
        for what, limit in hard.items():
            yield from _against_quota(asked, name, what, str(limit), str(used.get(what, "0")))


def _against_quota(asked: PodRequest, quota: str, what: str, hard: str, used: str) -> Iterator[str]:
    fewest, thing = asked.job.node_range[0], what.removeprefix("count/")
    left = (amount(hard) or 0.0) - (amount(used) or 0.0)
    said = f"quota {quota}: of {what} {hard} {used} are used"
    if thing in COUNTED:
        wanted = fewest if thing == "pods" else 1
        if wanted > left:
            key = "job.nodes" if thing == "pods" else "job.k8s.namespace"
            yield f"{said}, and the job makes {wanted}; change {key}, or ask for a larger quota"
        return
    which, _, resource = what.partition(".") if what.startswith(("requests.", "limits.")) else ("requests", "", what)
    each = asked.sums(which).get(resource)
    if each is None and resource in ("cpu", "memory"):
        key = "job.k8s.overlay" if what == "limits.cpu" else asked.key(resource)
        yield f"quota {quota}: every pod must say its {what}, unless a LimitRange does for it; set {key}"
    elif each is not None and each * fewest > left:
        key = asked.key(resource)
        yield f"{said}, and {fewest} pods ask for {_plain(each * fewest)}; change {key}, or ask for a larger quota"


def against_nodes(asked: PodRequest, nodes: Sequence[Plain]) -> Iterator[str]:
    """Yield a line for what no node has, or else if too few nodes have all of it."""
    excluded = asked.job.exclude
    inside = [node for node in nodes if _labels(node).get(HOST, node["metadata"]["name"]) not in excluded]
    selector = asked.pod.get("nodeSelector", {})
    chosen = [node for node in inside if selector.items() <= _labels(node).items()]
    if not chosen:
        without = f", without {' '.join(excluded)}" if excluded else ""
        yield f"none of {len(nodes)} nodes{without} has the labels {selector}; change job.k8s.node_selector"
        return
    wanted = asked.sums("requests")
    short = list(_short(asked, wanted, chosen))
    yield from short
    if not short:
        yield from _places(asked, wanted, chosen)


def beyond_any_node(asked: PodRequest, nodes: Sequence[Plain]) -> Iterator[str]:
    """Yield a line for each resource of which one pod requests more than any node has."""
    yield from _short(asked, asked.sums("requests"), nodes)


def _short(asked: PodRequest, wanted: Mapping[str, float], nodes: Sequence[Plain]) -> Iterator[str]:
    for resource, each in wanted.items():
        most = max(_has(node, resource) for node in nodes)
        if each > most:
            key = asked.key(resource)
            has = f"nodes have at most {_plain(most)}"
            yield f"{key}: a pod asks for {_plain(each)} of {resource}, and {has}; change {key}"


def _places(asked: PodRequest, wanted: Mapping[str, float], nodes: Sequence[Plain]) -> Iterator[str]:
    """Yield a line if the minimum number of pods would not fit even on idle nodes."""
    fewest = asked.job.node_range[0]
    tolerations = asked.pod.get("tolerations", [])
    closed = {taint["key"] for node in nodes if _places_on(node, wanted) for taint in _refusing(node, tolerations)}
    open_to_us = [node for node in nodes if not _refusing(node, tolerations)]
    places = sum(_places_on(node, wanted) for node in open_to_us)
    if places < fewest:
        taints = f", others are closed by {', '.join(sorted(closed))} (job.k8s.tolerations)" if closed else ""
        yield f"job.nodes={fewest}: the nodes have places for {places} such pods{taints}; change job.nodes"


def _places_on(node: Plain, wanted: Mapping[str, float]) -> int:
    asked = {**wanted, "pods": 1.0}
    return int(min(_has(node, resource) // each for resource, each in asked.items() if each > 0))


def _refusing(node: Plain, tolerations: Sequence[Plain]) -> list[Plain]:
    """Return the taints that keep our pods away for good."""
    taints = [each for each in node.get("spec", {}).get("taints") or [] if each["effect"] != "PreferNoSchedule"]
    lasting = [each for each in taints if not each["key"].startswith(PASSING)]
    return [taint for taint in lasting if not any(_tolerates(each, taint) for each in tolerations)]


def _tolerates(toleration: Plain, taint: Plain) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return (toleration.get("key"), toleration.get("value", "")) == (taint["key"], taint.get("value", ""))


def _labels(node: Plain) -> dict[str, str]:
    return node["metadata"].get("labels") or {}


def _has(node: Plain, resource: str) -> float:
    return amount(node.get("status", {}).get("allocatable", {}).get(resource)) or 0.0


def _plain(number: float) -> str:
    """Format a quantity: 64Gi for memory, 8 for a count."""
    for unit in ("Gi", "Mi"):
        size = {"Gi": 2**30, "Mi": 2**20}[unit]
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


FIXED = ("", "kind", "k3s", "rke2", "minikube")
"""Schemes of a node's providerID for machines that are not created on demand."""
MAKERS = {
    "karpenter.sh": "Karpenter",
    "autoscaling.x-k8s.io": "the cluster autoscaler",
    "cluster.x-k8s.io": "Cluster API",
}
"""API groups of controllers that create nodes."""


def lacking(job: JobConfig, main: Plain, client: Client, note: Callable[[str], None]) -> Iterator[str]:
    """Yield a line for each resource that no node has: a pod that requests it would wait without end.

    It takes one query, and a second one if something is missing; an account that may not list nodes gets no lines.
    `note` receives what may change while the job waits: labels, free places, and every line if nodes may be added.
    """
    try:
        nodes = client.items("/api/v1/nodes")
    except Refused:
        return
    asked = PodRequest(job, main)
    never = list(beyond_any_node(asked, nodes)) if nodes else []
    maker = on_demand(job, nodes, client) if never else None
    if never and maker is None:
        yield from never
        return
    reason = "" if maker is None else f" ({maker}, so the job is submitted all the same)"
    for line in never or (against_nodes(asked, nodes) if nodes else []):
        note(f"{line}{reason}")


def on_demand(job: JobConfig, nodes: Sequence[Plain], client: Client) -> str | None:
    """Return why further nodes may be added; None on a cluster of fixed machines."""
    if job.queue is not None:
        return f"queue {job.queue} may have nodes made, or send it to another cluster"
    providers = {each.get("spec", {}).get("providerID", "").partition("://")[0] for each in nodes}
    if clouds := sorted(providers - set(FIXED)):
        return f"nodes of {', '.join(clouds)} may be made on demand"
    groups = {each["name"] for each in (client.read("/apis") or {}).get("groups", [])}
    found = [name for group, name in MAKERS.items() if group in groups]
    return f"{found[0]} may make nodes on demand" if found else None

"""Resources that no node of a cluster has, and whether nodes that have them may be added on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from everstep.launch.config import JobConfig
from everstep.launch.schedulers.kubernetes.capacity import Asked, against_nodes, beyond_any_node
from everstep.launch.schedulers.kubernetes.client import Client, Refused
from everstep.launch.schedulers.kubernetes.pod import Plain

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
    asked = Asked(job, main)
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

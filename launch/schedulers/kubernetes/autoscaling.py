"""What no node of a cluster has, and whether that is the last word: where nodes are made on demand it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from everstep.launch.config import JobConfig
from everstep.launch.schedulers.kubernetes.capacity import Asked, against_nodes, beyond_any_node
from everstep.launch.schedulers.kubernetes.client import Client, Refused
from everstep.launch.schedulers.kubernetes.pod import Plain

FIXED = ("", "kind", "k3s", "rke2", "minikube")
"""Schemes of a node's providerID that name a machine which somebody has put there."""
MAKERS = {
    "karpenter.sh": "Karpenter",
    "autoscaling.x-k8s.io": "the cluster autoscaler",
    "cluster.x-k8s.io": "Cluster API",
}
"""API groups of what makes nodes."""


def lacking(job: JobConfig, main: Plain, client: Client, note: Callable[[str], None]) -> Iterator[str]:
    """What no node has, a line each: a pod that asks for it would wait for ever.

    One question, and a second where something is missing. An account that may not see nodes is told nothing. To `note`
    goes what may change while the job waits: labels, places, and everything where nodes may appear.
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
    """Why a node may appear that is not there yet; None on a cluster whose machines somebody has put there."""
    if job.queue is not None:
        return f"queue {job.queue} may have nodes made, or send it to another cluster"
    providers = {each.get("spec", {}).get("providerID", "").partition("://")[0] for each in nodes}
    if clouds := sorted(providers - set(FIXED)):
        return f"nodes of {', '.join(clouds)} may be made on demand"
    groups = {each["name"] for each in (client.read("/apis") or {}).get("groups", [])}
    found = [name for group, name in MAKERS.items() if group in groups]
    return f"{found[0]} may make nodes on demand" if found else None

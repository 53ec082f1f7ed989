"""Config keys of a job that apply only to Kubernetes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from everstep.config import require

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(kw_only=True)
class KubernetesConfig:
    context: str | None = None
    """Context of the kubeconfig; null is the current one, or the pod's own cluster."""
    namespace: str | None = None
    """null is the namespace of the context."""
    service_account: str | None = None
    """Service account of the pods, which gives access to object stores by workload identity."""
    api_token: bool = False
    """Mount the service account's token. Workload identity has its own token and does not need it."""
    image_pull_secrets: list[str] = field(default_factory=list)
    image_pull_policy: str = "IfNotPresent"
    secret: str | None = None
    """Secret whose keys are the names in job.secrets; only its name is recorded."""
    priority_class: str | None = None
    queue_priority: str | None = None
    """Kueue's WorkloadPriorityClass."""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Further tolerations in Kubernetes' own form, such as those of spot nodes."""
    lost_node_s: int = 30
    """Seconds before pods are evicted from a node that is not ready; Kubernetes' default is 300."""
    topology: str | None = None
    """Label of nodes whose value all pods should share, such as topology.kubernetes.io/zone."""
    gpu_resource: str = "nvidia.com/gpu"
    rdma_resource: str | None = None
    """Resource of the network cards, such as rdma/hca or vpc.amazonaws.com/efa."""
    rdma_count: int = 1
    shm_gb: int = 8
    """Size of /dev/shm; it counts against job.mem. The default of 64 MB is too small for NCCL and loaders."""
    scratch_gb: int | None = None
    """Limit of /tmp on the node's disk; null sets none."""
    cache_gb: int | None = None
    """Limit of the cache of shards on the node's disk; null sets none."""
    cache_claim: str | None = None
    """PersistentVolumeClaim for the cache of shards in place of the node's disk."""
    claims: dict[str, str] = field(default_factory=dict)
    """PersistentVolumeClaim → mount path."""
    run_as_user: int = 1000
    """User and group of the processes; never root."""
    keep_s: int = 7 * 86400
    """Seconds after which a finished job is removed from the cluster; the run folder stays."""
    restart_delay_s: int = 120
    """Longest back-off of Kubernetes, in seconds, before it starts a lost pod again.

    If it would wait longer, `resume`, `submit` and the driver of a sweep make a new job, and `status` reports it.
    """
    overlay: str | None = None
    """File with a strategic merge patch for the job, applied last."""

    def __post_init__(self) -> None:
        for key in ("namespace", "service_account", "secret", "cache_claim"):
            value = getattr(self, key)
            if value is not None:
                fits = LABEL.fullmatch(value) is not None
                require(fits, f"job.k8s.{key}", value, "must be lower-case letters, digits and '-'")
        policies = ("Always", "IfNotPresent", "Never")
        require(
            self.image_pull_policy in policies,
            "job.k8s.image_pull_policy",
            self.image_pull_policy,
            f"must be {', '.join(policies)}",
        )
        require(self.run_as_user >= 1, "job.k8s.run_as_user", self.run_as_user, "must be ≥ 1: root is refused")
        for key in ("lost_node_s", "shm_gb", "rdma_count", "keep_s", "restart_delay_s"):
            require(getattr(self, key) >= 0, f"job.k8s.{key}", getattr(self, key), "must be ≥ 0")
        for claim, path in self.claims.items():
            require(path.startswith("/"), f"job.k8s.claims.{claim}", path, "must be an absolute path")

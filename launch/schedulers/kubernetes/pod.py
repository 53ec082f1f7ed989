"""Template of a job's pods: plain data, the same for the same job."""

from __future__ import annotations

from typing import Any

from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.kubernetes.labels import CONTAINER, JOB_NAME, PORT, labels, token_secret
from everstep.security.job_secrets import TOKEN

GRACE_SLACK_S = 30
"""Seconds for a pod beyond job.grace_s: the supervisor kills its processes and writes a report."""
SETTINGS = "/etc/everstep"
CACHE = "/cache"
HOME = "/tmp"
TOLERATED = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

Plain = dict[str, Any]


def template(job: JobConfig, program: Program, name: str, settings: str, owner: tuple[str, str]) -> Plain:
    """Return the pod template.

    Args:
        name: name of the job and of its service.
        settings: name of the ConfigMap.
        owner: label that all pods of this job have, and no others.
    """
    metadata: Plain = {"labels": {**labels(program), **({} if owner[0] == JOB_NAME else {owner[0]: owner[1]})}}
    annotations = {
        # A scale-down or a consolidation must not stop a training; these annotations forbid it to the two autoscalers.
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    if job.queue is not None and job.k8s.topology is not None:
        annotations["kueue.x-k8s.io/podset-required-topology"] = job.k8s.topology
    return {"metadata": {**metadata, "annotations": annotations}, "spec": _spec(job, program, name, settings, owner)}


def _spec(job: JobConfig, program: Program, name: str, settings: str, owner: tuple[str, str]) -> Plain:
    k8s = job.k8s
    spec: Plain = {
        # A failed pod is replaced, never restarted in place: podFailurePolicy requires it.
        "restartPolicy": "Never",
        "subdomain": name,
        # Longer than the grace period of the processes, or their last save would be killed.
        "terminationGracePeriodSeconds": job.grace_s + GRACE_SLACK_S,
        "automountServiceAccountToken": k8s.api_token,
        "enableServiceLinks": False,
        # With this, the pod passes Pod Security "restricted".
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": k8s.run_as_user,
            "runAsGroup": k8s.run_as_user,
            "fsGroup": k8s.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(job),
        "topologySpreadConstraints": [_spread(owner)],
    }
    given: Plain = {
        "serviceAccountName": k8s.service_account,
        "imagePullSecrets": [{"name": secret} for secret in k8s.image_pull_secrets],
        "priorityClassName": k8s.priority_class,
        "nodeSelector": dict(k8s.node_selector),
        "affinity": _affinity(job, owner),
    }
    spec |= {key: value for key, value in given.items() if value}
    return {**spec, "containers": [_container(job, program, name)], "volumes": _volumes(job, settings)}


def _tolerations(job: JobConfig) -> list[Plain]:
    """Evict a pod soon after its node is lost: Kubernetes' 300 s would add to the 50 s of detection."""
    lost = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": job.k8s.lost_node_s}
        for key in TOLERATED
    ]
    return [*lost, *job.k8s.tolerations]


def _spread(owner: tuple[str, str]) -> Plain:
    """Spread the pods, so that one lost node costs one pod, if there are enough nodes."""
    selector = {"matchLabels": {owner[0]: owner[1]}}
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": selector,
    }


def _affinity(job: JobConfig, owner: tuple[str, str]) -> Plain:
    affinity: Plain = {}
    if job.exclude:
        avoid = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(job.exclude)}
        terms = [{"matchExpressions": [avoid]}]
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    if job.k8s.topology is not None and job.queue is None:
        # Preferred, not required: without Kueue pods are placed one by one, and the last could wait without end.
        term = {"topologyKey": job.k8s.topology, "labelSelector": {"matchLabels": {owner[0]: owner[1]}}}
        wish = {"weight": 100, "podAffinityTerm": term}
        affinity["podAffinity"] = {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}
    return affinity


def _container(job: JobConfig, program: Program, name: str) -> Plain:
    capabilities: Plain = {"drop": ["ALL"]}
    if job.k8s.rdma_resource is not None:
        # RDMA pins memory. This capability exceeds Pod Security "restricted"; the namespace must allow it.
        capabilities["add"] = ["IPC_LOCK"]
    return {
        "name": CONTAINER,
        "image": job.image,
        "imagePullPolicy": job.k8s.image_pull_policy,
        # The supervisor is process 1: a shell in its place would not pass SIGTERM on.
        "command": [
            job.python or "python",
            "-m",
            "everstep.launch.node.pod",
            program.folder,
            "--spec",
            program.spec(job),
        ],
        "env": _env(job, name),
        "ports": [{"name": "rendezvous", "containerPort": PORT, "protocol": "TCP"}],
        "resources": resources(job),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": capabilities,
        },
        # The reason why a pod ended is kept in its status, also when its log is gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(job),
    }


def _env(job: JobConfig, name: str) -> list[Plain]:
    """Return plain values, pod fields, and secrets by reference: their values are never read here."""
    told = {"POD_IP": "status.podIP", "POD_UID": "metadata.uid", "NODE_NAME": "spec.nodeName"}
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    return [
        {"name": "EVERSTEP_JOB", "value": name},
        {"name": "EVERSTEP_SETTINGS", "value": SETTINGS},
        # Kubernetes sets it by itself; it is repeated for programs that read the manifest.
        {"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": index}},
        *({"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in told.items()),
        {"name": "HOME", "value": HOME},
        {"name": "EVERSTEP_CACHE", "value": CACHE},
        *({"name": key, "value": value} for key, value in job.env.items()),
        *({"name": key, "valueFrom": {"secretKeyRef": {"name": job.k8s.secret, "key": key}}} for key in job.secrets),
        *([_token(name)] if job.node_range[1] > 1 else []),
    ]


def _token(name: str) -> Plain:
    """Return the job's token, from a Secret that `submit` makes.

    It is optional: without it the head pod writes a token into the run folder, or refuses to start.
    """
    reference = {"name": token_secret(name), "key": TOKEN, "optional": True}
    return {"name": TOKEN, "valueFrom": {"secretKeyRef": reference}}


def resources(job: JobConfig) -> Plain:
    """Return memory and devices as limits, CPUs as requests only: a CPU limit would throttle the loaders."""
    requests: Plain = {}
    limits: Plain = {}
    if job.cpus is not None:
        requests["cpu"] = str(job.cpus)
    if job.mem is not None:
        requests["memory"] = limits["memory"] = quantity(job.mem)
    if (count := gpus(job)) is not None:
        limits[job.k8s.gpu_resource] = str(count)
    if job.k8s.rdma_resource is not None:
        limits[job.k8s.rdma_resource] = str(job.k8s.rdma_count)
    found = {"requests": requests, "limits": limits}
    return {key: value for key, value in found.items() if value}


def gpus(job: JobConfig) -> int | None:
    """Return the GPUs of each pod; None requests none."""
    wanted = job.nproc if job.gpus == "auto" else job.gpus
    return wanted or None if isinstance(wanted, int) else None


def quantity(text: str) -> str:
    """Return Slurm's 64G in Kubernetes' form, 64Gi, which itself stays as it is."""
    plain = text.strip()
    return f"{plain}i" if plain[-1:] in ("K", "M", "G", "T") else plain


def _mounts(job: JobConfig) -> list[Plain]:
    claims = [{"name": f"claim-{claim}", "mountPath": path} for claim, path in job.k8s.claims.items()]
    return [
        {"name": "settings", "mountPath": SETTINGS, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE},
        *claims,
    ]


def _volumes(job: JobConfig, settings: str) -> list[Plain]:
    k8s = job.k8s
    cache: Plain = {"emptyDir": _sized(k8s.cache_gb)}
    if k8s.cache_claim is not None:
        cache = {"persistentVolumeClaim": {"claimName": k8s.cache_claim}}
    claims = [{"name": f"claim-{claim}", "persistentVolumeClaim": {"claimName": claim}} for claim in k8s.claims]
    return [
        {"name": "settings", "configMap": {"name": settings}},
        {"name": "shm", "emptyDir": {"medium": "Memory", **_sized(k8s.shm_gb)}},
        # The root file system is read-only; these are the writable places.
        {"name": "scratch", "emptyDir": _sized(k8s.scratch_gb)},
        {"name": "cache", **cache},
        *claims,
    ]


def _sized(gigabytes: int | None) -> Plain:
    return {} if gigabytes is None else {"sizeLimit": f"{gigabytes}Gi"}

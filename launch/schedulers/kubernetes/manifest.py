"""Rendering of a job for Kubernetes: plain objects, and the text for `kubectl apply -f -`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from everstep.launch.config import JobConfig, job_yaml
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.kubernetes import strategic_merge
from everstep.launch.schedulers.kubernetes.labels import (
    CONTAINER,
    JOB_NAME,
    JOBSET_NAME,
    NODES,
    PORT,
    job_name,
    labels,
)
from everstep.launch.schedulers.kubernetes.pod import Plain, resources, template

DO_NOT_RETRY = 78
"""Exit code of a pod whose job must not be tried again: the config is wrong, or no restarts are left."""
WORLD_BROKE = 75
"""Exit code of a healthy pod that cannot continue."""
PREEMPTED = 143
"""Exit code of a pod that was asked to stop: 128 + SIGTERM; 0 would complete its index for good."""
JOBSET = "jobset.x-k8s.io/v1alpha2"
TRAINJOB = "trainer.kubeflow.org/v1alpha1"
RUNTIME = "torch-distributed"


def objects(job: JobConfig, program: Program) -> list[Plain]:
    """Return all objects of a job in the order of creation; the job itself is the last."""
    name = job_name(program)
    config = _settings(job, program, name)
    made = {"job": _job, "jobset": _jobset, "trainjob": _trainjob}[job.kind](job, program, name, _name(config))
    if job.k8s.overlay is not None:
        made = strategic_merge.merge(made, strategic_merge.read(job.k8s.overlay))
    owner = (JOB_NAME if job.kind == "job" else JOBSET_NAME, name)
    # A JobSet creates its own service.
    services = [_service(job, program, name)] if job.kind == "job" else []
    return [config, *services, _network_policy(job, program, owner), made]


def manifest(made: list[Plain]) -> str:
    """Return the objects as YAML without anchors, for easier reading."""
    import yaml

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return "".join(
        f"---\n{yaml.dump(each, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)}" for each in made
    )


def _metadata(job: JobConfig, program: Program, name: str) -> Plain:
    namespace = {} if job.k8s.namespace is None else {"namespace": job.k8s.namespace}
    return {"name": name, **namespace, "labels": labels(program)}


def _name(thing: Plain) -> str:
    return str(thing["metadata"]["name"])


def _settings(job: JobConfig, program: Program, name: str) -> Plain:
    """Return the ConfigMap that the pods read.

    It is immutable and named by its content: a running pod never sees another one, and the kubelet need not watch it.
    """
    data = {
        "program.json": json.dumps({"argv": list(program.argv), "token": program.token, "run": program.name}, indent=1),
        "job.yaml": job_yaml(job),
        **({"config.yaml": program.config} if program.config else {}),
    }
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, program, f"{name}-{digest}"),
        "immutable": True,
        "data": data,
    }


def _service(job: JobConfig, program: Program, name: str) -> Plain:
    """Return the service that gives pods names, for other programs; pods find each other by address."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, program, name),
        "spec": {
            "clusterIP": "None",
            # Pods must find each other before they are ready.
            "publishNotReadyAddresses": True,
            "selector": {JOB_NAME: name},
            "ports": [{"name": "rendezvous", "port": PORT, "protocol": "TCP"}],
        },
    }


def _network_policy(job: JobConfig, program: Program, owner: tuple[str, str]) -> Plain:
    """Return the policy that lets only pods of the same job connect to the job's pods.

    Args:
        owner: label that all pods of this job have, and no others.
    """
    pods = {"matchLabels": {owner[0]: owner[1]}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, program, owner[1]),
        "spec": {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": pods}]}]},
    }


def _job(job: JobConfig, program: Program, name: str, settings: str) -> Plain:
    metadata = _with_queue(job, _metadata(job, program, name))
    spec = _job_spec(job, template(job, program, name, settings, (JOB_NAME, name)))
    spec["ttlSecondsAfterFinished"] = job.k8s.keep_s
    if job.queue is not None:
        # Kueue starts the job when all of its pods are admitted; without Kueue it would stay suspended.
        spec["suspend"] = True
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _job_spec(job: JobConfig, pods: Plain) -> Plain:
    most = job.node_range[1]
    spec: Plain = {
        "completionMode": "Indexed",
        # Both the same, or pods would be started one after another.
        "completions": most,
        "parallelism": most,
        # Per index: with one limit for the whole job, three pods that are evicted together come back after 40 s and
        # not after 10 s.
        "backoffLimitPerIndex": job.max_restarts,
        # One index that cannot continue stops all of them.
        "maxFailedIndexes": 0,
        # No second pod of an index while the first may still be writing.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules()},
        # Index 0 ends last; pods that are still pending then are not needed any more.
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
    }
    if job.time_s is not None:
        spec["activeDeadlineSeconds"] = job.time_s
    return {**spec, "template": pods}


def _failure_rules() -> list[Plain]:
    """Return the rules for failed pods: the first match decides; without a match the failure counts."""
    return [
        # First, so that a pod that was asked to stop cannot fail the job, whatever its exit code.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [DO_NOT_RETRY]}},
        # The peers of a lost pod, and pods after `kubectl delete pod`, have no such condition.
        {
            "action": "Ignore",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [WORLD_BROKE, PREEMPTED]},
        },
    ]


def _with_queue(job: JobConfig, metadata: Plain) -> Plain:
    """Add the labels by which Kueue finds a job."""
    given = {"kueue.x-k8s.io/queue-name": job.queue, "kueue.x-k8s.io/priority-class": job.k8s.queue_priority}
    found = {key: value for key, value in given.items() if value is not None and job.queue is not None}
    made = {**metadata, "labels": {**metadata["labels"], **found}}
    fewest, most = job.node_range
    if job.queue is not None and job.kind == "job" and fewest < most:
        made["annotations"] = {
            "kueue.x-k8s.io/job-min-parallelism": str(fewest),
            "kueue.x-k8s.io/job-completions-equal-parallelism": "true",
        }
    return made


def _jobset(job: JobConfig, program: Program, name: str, settings: str) -> Plain:
    metadata = _with_queue(job, _metadata(job, program, name))
    if job.k8s.topology is not None:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": job.k8s.topology}
    inner = _job_spec(job, template(job, program, name, settings, (JOBSET_NAME, name)))
    spec: Plain = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        # The inner job fails for good only by its own policy: another start would fail as well.
        "failurePolicy": {
            "maxRestarts": job.max_restarts,
            "rules": [{"name": "donotretry", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "successPolicy": {"operator": "All", "targetReplicatedJobs": [NODES]},
        "ttlSecondsAfterFinished": job.k8s.keep_s,
        **({} if job.queue is None else {"suspend": True}),
        "replicatedJobs": [{"name": NODES, "replicas": 1, "template": {"spec": inner}}],
    }
    return {"apiVersion": JOBSET, "kind": "JobSet", "metadata": metadata, "spec": spec}


def _trainjob(job: JobConfig, program: Program, name: str, settings: str) -> Plain:
    """Return the TrainJob for Kubeflow's Trainer; its runtime, not this manifest, sets how failures count."""
    pods = template(job, program, name, settings, (JOBSET_NAME, name))
    (container,) = pods["spec"]["containers"]
    mounts, security = container["volumeMounts"], container["securityContext"]
    taken = (
        "serviceAccountName",
        "nodeSelector",
        "affinity",
        "tolerations",
        "volumes",
        "imagePullSecrets",
        "securityContext",
        "terminationGracePeriodSeconds",
    )
    patch = {key: pods["spec"][key] for key in taken if key in pods["spec"]}
    patch["containers"] = [{"name": NODES, "volumeMounts": mounts, "securityContext": security}]
    nodes = {"name": NODES, "template": {"spec": {"template": {"metadata": pods["metadata"], "spec": patch}}}}
    # The numbers of processes are for torchrun, which our supervisor starts: the runtime's variables are not used.
    trainer: Plain = {
        "image": job.image,
        "command": container["command"],
        "env": container["env"],
        "numNodes": job.node_range[1],
        **({"resourcesPerNode": resources(job)} if resources(job) else {}),
    }
    patches = [
        {"manager": "everstep.dev/launcher", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [nodes]}}}}
    ]
    spec: Plain = {
        "runtimeRef": {"apiGroup": TRAINJOB.split("/")[0], "kind": "ClusterTrainingRuntime", "name": RUNTIME},
        "trainer": trainer,
        "runtimePatches": patches,
        **({} if job.queue is None else {"suspend": True}),
    }
    metadata = _with_queue(job, _metadata(job, program, name))
    return {"apiVersion": TRAINJOB, "kind": "TrainJob", "metadata": metadata, "spec": spec}

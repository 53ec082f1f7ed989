"""Mistakes that an API server accepts although the job cannot work: pure, on the rendered objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.kubernetes.labels import CONTAINER, JOB_NAME
from everstep.launch.schedulers.kubernetes.pod import GRACE_SLACK_S, Plain
from everstep.security.secret_detection import SECRET_FORMS, is_secret_name
from everstep.storage import open_storage

MOST_BYTES = 1 << 20
"""Size limit of a ConfigMap."""
LONGEST_LABEL = 63
SMALL = {"m": 1e-3, "": 1.0, "k": 1e3, "K": 1e3}
UNITS = {**SMALL, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|[KMGT]i?|)")
NOT_HERE = ("partition", "account", "qos", "constraint", "reservation", "flags", "setup", "mounts")
"""Slurm keys without effect on Kubernetes."""


def mistakes(job: JobConfig, program: Program, objects: list[Plain]) -> list[str]:
    """Return one line per mistake with the key to change; `objects` are the rendered job with overlay."""
    main = objects[-1]
    found = [*_keys(job), *_folder(job, program), *_settings(objects)]
    spec = main["spec"]
    if main["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    if main["kind"] == "TrainJob":
        found += _literals(spec["trainer"].get("env", []))
    else:
        found += [*_job(main, spec), *_pod(job, spec["template"]["spec"]), *_selectors(objects, main)]
    return list(dict.fromkeys(found))


def _keys(job: JobConfig) -> Iterator[str]:
    if job.image is None or job.image.strip() in ("", "none"):
        yield f"job.image={job.image!r}: every pod needs an image; change job.image"
    if job.secrets and job.k8s.secret is None:
        yield f"job.secrets={job.secrets}: job.k8s.secret must name the Secret that holds them"
    if job.nproc == "auto" and job.gpus == "auto":
        yield "job.nproc='auto': a pod has the GPUs that it asks for; set job.nproc or job.gpus"
    if job.k8s.queue_priority is not None and job.queue is None:
        yield f"job.k8s.queue_priority={job.k8s.queue_priority!r}: has no effect without job.queue"
    for key in NOT_HERE:
        if value := getattr(job, key):
            yield f"job.{key}={value!r}: has no meaning on Kubernetes; leave it out"


def _folder(job: JobConfig, program: Program) -> Iterator[str]:
    """Yield a line if the pods cannot see the run folder: they do not share the submitting machine's disk."""
    path = open_storage(program.folder).path()
    if path is None:
        return
    mounts = list(job.k8s.claims.values())
    if not any(path.is_relative_to(mount) for mount in mounts):
        where = f"no volume is mounted above it ({', '.join(mounts)})" if mounts else "no volume is mounted there"
        yield (
            f"run_root={str(path.parent)!r}: pods do not see this machine's disk, and {where}; "
            "change run_root to a URL, or job.k8s.claims"
        )


def _settings(objects: list[Plain]) -> Iterator[str]:
    for each in objects:
        if each["kind"] != "ConfigMap":
            continue
        size = sum(len(key.encode()) + len(value.encode()) for key, value in each["data"].items())
        if size > MOST_BYTES:
            yield f"config.yaml and job.yaml have {size} bytes, a ConfigMap holds {MOST_BYTES}; make the config smaller"
        for key, value in each["data"].items():
            if SECRET_FORMS.search(value):
                yield f"{key} holds what looks like a secret; name it in job.secrets and keep it in a Secret"


def _job(main: Plain, spec: Plain) -> Iterator[str]:
    completions, parallelism = spec.get("completions"), spec.get("parallelism")
    if completions != parallelism:
        yield f"parallelism={parallelism} and completions={completions}: must be the same; change job.k8s.overlay"
    name = f"{main['metadata']['name']}{'' if main['kind'] == 'Job' else '-node-0'}-{max(0, (completions or 1) - 1)}"
    if len(name) > LONGEST_LABEL:
        yield f"pods would be called {name!r}, {len(name)} letters of {LONGEST_LABEL}; give a shorter run="
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    for rule in rules:
        codes = rule.get("onExitCodes", {}).get("values", [])
        if wrong := [code for code in codes if not 0 <= code <= 255]:
            yield f"podFailurePolicy: no process ends with exit code {wrong[0]}; change job.k8s.overlay"
    disruption = [n for n, rule in enumerate(rules) if rule.get("onPodConditions")]
    if rules and disruption[:1] != [0]:
        yield "podFailurePolicy: the rule about DisruptionTarget must be the first; change job.k8s.overlay"


def _pod(job: JobConfig, spec: Plain) -> Iterator[str]:
    grace, least = spec.get("terminationGracePeriodSeconds", 30), job.grace_s + GRACE_SLACK_S
    if grace < least:
        yield (
            f"terminationGracePeriodSeconds={grace}: must be ≥ job.grace_s + {GRACE_SLACK_S} = {least}; "
            "change job.k8s.overlay"
        )
    if spec.get("hostNetwork"):
        yield "hostNetwork: Pod Security 'restricted' refuses it; change job.k8s.overlay"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']}: Pod Security 'restricted' refuses hostPath; change job.k8s.overlay"
    containers = spec.get("containers", [])
    for container in containers:
        yield from _literals(container.get("env", []))
    ours = next((each for each in containers if each["name"] == CONTAINER), None)
    if ours is None:
        yield f"there is no container {CONTAINER!r} any more; change job.k8s.overlay"
        return
    yield from _shm(ours, spec)


def _shm(container: Plain, spec: Plain) -> Iterator[str]:
    memory = amount(container.get("resources", {}).get("limits", {}).get("memory"))
    for volume in spec.get("volumes", []):
        directory = volume.get("emptyDir") or {}
        size = amount(directory.get("sizeLimit")) if directory.get("medium") == "Memory" else None
        if memory is not None and size is not None and size > memory:
            yield (
                f"job.k8s.shm_gb: /dev/shm of {directory['sizeLimit']} counts against the memory limit, which is "
                f"{container['resources']['limits']['memory']}; change job.k8s.shm_gb or job.mem"
            )


def _selectors(objects: list[Plain], main: Plain) -> Iterator[str]:
    for each in objects:
        selector = each["spec"].get("selector", {}) if each["kind"] == "Service" else {}
        labels = {
            **main["spec"].get("template", {}).get("metadata", {}).get("labels", {}),
            JOB_NAME: main["metadata"]["name"],
        }
        if missed := {key: value for key, value in selector.items() if labels.get(key) != value}:
            yield f"service {each['metadata']['name']} selects pods with {missed}, and ours have no such label"


def _literals(env: list[dict[str, Any]]) -> Iterator[str]:
    for each in env:
        value = str(each.get("value", ""))
        if value and (is_secret_name(each["name"]) or SECRET_FORMS.search(value)):
            yield f"env {each['name']}: its value would stand in the manifest; name it in job.secrets instead"


def amount(text: str | int | None) -> float | None:
    """Return the value of a quantity: bytes of 8Gi or 500M, 0.5 for 500m; None if missing or unknown."""
    form = QUANTITY.fullmatch(str(text)) if text is not None else None
    return float(form[1]) * UNITS[form[2]] if form is not None else None

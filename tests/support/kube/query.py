"""What a path and its query ask for."""

from __future__ import annotations

from typing import Any

from support.kube.object_store import ApiError, Fits, Plain, labelled

KINDS = {"pods": "Pod", "services": "Service", "configmaps": "ConfigMap", "jobs": "Job", "nodes": "Node",
         "namespaces": "Namespace", "resourcequotas": "ResourceQuota",
         "persistentvolumeclaims": "PersistentVolumeClaim", "storageclasses": "StorageClass",
         "localqueues": "LocalQueue", "workloads": "Workload", "secrets": "Secret", "events": "Event",
         "leases": "Lease", "persistentvolumes": "PersistentVolume", "networkpolicies": "NetworkPolicy"}  # fmt: skip


def parse(path: str) -> tuple[str, str, str, str]:
    words = path.strip("/").split("/")
    words = words[2:] if words[0] == "api" else words[3:]
    namespace = ""
    if words[:1] == ["namespaces"] and len(words) > 2:
        namespace, words = words[1], words[2:]
    plural, name, sub = [*words, "", "", ""][:3]
    if plural not in KINDS:
        raise ApiError(404, "NotFound", "the server could not find the requested resource")
    return plural, namespace, name, sub


def selected(query: Plain) -> Fits:
    """By labels and fields, as they are asked for."""
    with_labels = labelled(_pairs(query.get("labelSelector", "")))
    fields = _pairs(query.get("fieldSelector", ""))
    return lambda thing: with_labels(thing) and all(_field(thing, path) == wanted for path, wanted in fields.items())


def _field(thing: Any, path: str) -> Any:
    for word in path.split("."):
        thing = (thing or {}).get(word)
    return thing


def _pairs(text: str) -> Plain:
    pairs = [word.partition("=") for word in text.split(",") if word]
    return {key: value if equals else None for key, equals, value in pairs}

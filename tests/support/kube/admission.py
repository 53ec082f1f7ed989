"""What the API server refuses: field types by the published schemas, the rest row by row as a real 1.36 answered."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate

from support.kube.object_store import ApiError

Plain = dict[str, Any]
VERSION = "1.37"
QUANTITY = re.compile(r"[+-]?(\d+|\d+\.\d*|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")


def admit(thing: Plain) -> None:
    """ApiError 400 for what cannot be decoded, 422 for what makes no sense."""
    try:
        kubernetes_validate.validate(thing, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ApiError(400, "BadRequest", f"strict decoding error: {error.message} at {list(error.path)}") from error
    if thing["kind"] == "ConfigMap" and sum(map(len, thing.get("data", {}).values())) > 1048576:
        raise _invalid("data", "Too long: must have at most 1048576 bytes")
    if thing["kind"] == "Job":
        _job(thing["metadata"]["name"], thing["spec"])


def _job(name: str, spec: Plain) -> None:
    indexed = spec.get("completionMode", "NonIndexed")
    _one_of("spec.completionMode", indexed, "Indexed", "NonIndexed")
    _one_of("spec.template.spec.restartPolicy", spec["template"]["spec"].get("restartPolicy"), "Never", "OnFailure")
    for key in ("backoffLimitPerIndex", "maxFailedIndexes", "successPolicy"):
        if key in spec and indexed != "Indexed":
            raise _invalid(f"spec.{key}", "requires indexed completion mode")
    completions = spec.get("completions", 1)
    if spec.get("maxFailedIndexes", 0) > completions:
        raise _invalid("spec.maxFailedIndexes", "must be less than or equal to completions")
    last = f"{name}-{completions - 1}"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", last):
        raise _invalid("metadata.name", f"will not able to create pod with invalid DNS label: {last}")
    for rule in spec.get("successPolicy", {}).get("rules", []):
        if int(re.split("[,-]", rule["succeededIndexes"])[-1]) >= completions:
            raise _invalid("spec.successPolicy", "error parsing succeededIndexes: too large index")
    containers = spec["template"]["spec"]["containers"]
    if "podFailurePolicy" in spec:
        _policy(spec, [each["name"] for each in containers])
    volumes = {each["name"] for each in spec["template"]["spec"].get("volumes", [])}
    for container in containers:
        _container(container, volumes)


def _policy(spec: Plain, names: list[str]) -> None:
    if spec["template"]["spec"]["restartPolicy"] != "Never":
        raise _invalid("restartPolicy", 'only "Never" is supported when podFailurePolicy is specified')
    _one_of("spec.podReplacementPolicy", spec.get("podReplacementPolicy", "Failed"), "Failed")
    for rule in spec["podFailurePolicy"]["rules"]:
        _one_of("action", rule["action"], "Count", "FailIndex", "FailJob", "Ignore")
        codes = rule.get("onExitCodes")
        if codes and rule.get("onPodConditions"):
            raise _invalid("rules", "specifying both OnExitCodes and OnPodConditions is not supported")
        if codes and codes["values"] != sorted(set(codes["values"])):
            raise _invalid("values", "must be ordered")
        if codes and codes["operator"] == "In" and 0 in codes["values"]:
            raise _invalid("values", "must not be 0 for the In operator")
        if codes and codes.get("containerName", names[0]) not in names:
            raise _invalid("containerName", "must be one of the container or initContainer names in the pod template")


def _container(container: Plain, volumes: set[str]) -> None:
    if not container.get("image"):
        raise _invalid("image", "Required value")
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            raise _invalid("volumeMounts", f'Not found: "{mount["name"]}"')
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for value in (*requests.values(), *limits.values()):
        if not QUANTITY.fullmatch(str(value)):
            raise ApiError(400, "BadRequest", "quantities must match the regular expression")
    for key, value in requests.items():
        if "/" in key and key not in limits:
            raise _invalid(key, "Limit must be set for non overcommitable resources")
        if "/" in key and limits[key] != value:
            raise _invalid(key, f"must be equal to {key} limit of {limits[key]}")


def _one_of(where: str, value: object, *allowed: str) -> None:
    if value not in allowed:
        raise _invalid(where, f'Unsupported value: "{value}": supported values: {_quoted(allowed)}')


def _quoted(words: tuple[str, ...]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _invalid(where: str, why: str) -> ApiError:
    return ApiError(422, "Invalid", f"{where}: Invalid value: {why}")

"""Strategic merge patch of the user, applied last to a manifest: for fields without a config key."""

from __future__ import annotations

from typing import Any

from everstep.errors import ConfigError

MERGED_BY = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "replicatedJobs": "name",
    "topologySpreadConstraints": "topologyKey",
}
"""Lists whose items have a key, by which they are merged one by one. All other lists are replaced."""


def merge(base: Any, patch: Any, field: str = "") -> Any:
    """Return `base` patched: mappings are merged, null removes, `$patch: delete` drops an item of a list."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return _mapping(base, patch)
    if isinstance(base, list) and isinstance(patch, list) and field in MERGED_BY:
        return _items(base, patch, MERGED_BY[field], field)
    return patch


def _mapping(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(base.get(key), value, key) if key in base else value
    return merged


def _items(base: list[Any], patch: list[Any], key: str, field: str) -> list[Any]:
    merged = list(base)
    for item in patch:
        if not isinstance(item, dict) or key not in item:
            raise ConfigError(f"job.k8s.overlay: an item of {field} has no {key!r}, by which it would be merged")
        at = next((n for n, each in enumerate(merged) if each.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            merged = [each for each in merged if each.get(key) != item[key]]
        elif at is None:
            merged.append(item)
        else:
            merged[at] = _mapping(merged[at], item)
    return merged


def read(path: str) -> dict[str, Any]:
    """Return the patch in a file; ConfigError if it is missing or no mapping."""
    import yaml

    try:
        with open(path) as file:
            patch = yaml.safe_load(file) or {}
    except OSError as error:
        raise ConfigError(f"job.k8s.overlay={path!r}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"job.k8s.overlay={path!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(patch, dict):
        raise ConfigError(f"job.k8s.overlay={path!r}: must be one YAML mapping, a patch for the job")
    return patch

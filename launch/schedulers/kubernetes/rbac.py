"""Permissions that the launcher needs in its namespace, as granted by k8s/rbac.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Plain = dict[str, Any]
Right = tuple[str, str, str]
"""Group, resource, verb."""
WORKLOAD = ("get", "list", "watch", "create", "patch", "delete")
GRANTED = {
    ("batch", "jobs"): WORKLOAD,
    # All kinds are queried, whichever is used: another launcher may have submitted the run as another kind.
    ("jobset.x-k8s.io", "jobsets"): WORKLOAD,
    ("trainer.kubeflow.org", "trainjobs"): WORKLOAD,
    ("", "services"): ("get", "list", "create", "patch"),
    ("", "configmaps"): ("get", "list", "create", "patch"),
    ("networking.k8s.io", "networkpolicies"): ("get", "list", "create", "patch"),
    # Without the right to read: the launcher makes the token of a job once and never reads it back.
    ("", "secrets"): ("create",),
    ("", "pods"): ("get", "list", "watch"),
}


def needed() -> Iterator[Right]:
    for (group, resource), verbs in GRANTED.items():
        yield from ((group, resource, verb) for verb in verbs)


def covers(rules: Iterable[Plain], right: Right) -> bool:
    """True if a rule of a SelfSubjectRulesReview grants the right for objects of any name."""
    keys = ("apiGroups", "resources", "verbs")
    return any(
        not rule.get("resourceNames")
        and all(word in rule.get(key, []) or "*" in rule.get(key, []) for key, word in zip(keys, right, strict=True))
        for rule in rules
    )


def review(namespace: str, right: Right) -> Plain:
    """Return the query for one right, which every account may make about itself."""
    group, resource, verb = right
    asked = {"namespace": namespace, "group": group, "resource": resource, "verb": verb}
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }


def rules_review(namespace: str) -> Plain:
    """Return the query for all rights at once; its answer may be incomplete."""
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }


def missing(rights: Iterable[Right]) -> Iterator[str]:
    """Yield a phrase per resource with the verbs that are not permitted."""
    verbs: dict[str, list[str]] = {}
    for group, resource, verb in rights:
        verbs.setdefault(f"{resource}.{group}".rstrip("."), []).append(verb)
    yield from (f"{', '.join(which)} {resource}" for resource, which in verbs.items())

"""What the launcher has to be allowed to do in its namespace: the same as k8s/rbac.yaml grants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Plain = dict[str, Any]
Right = tuple[str, str, str]
"""Group, resource, verb."""
WORKLOAD = ("get", "list", "watch", "create", "patch", "delete")
GRANTED = {
    ("batch", "jobs"): WORKLOAD,
    # All kinds are looked at, whichever is used: somebody else may have submitted the run as another.
    ("jobset.x-k8s.io", "jobsets"): WORKLOAD,
    ("trainer.kubeflow.org", "trainjobs"): WORKLOAD,
    ("", "services"): ("get", "list", "create", "patch"),
    ("", "configmaps"): ("get", "list", "create", "patch"),
    ("", "pods"): ("get", "list", "watch"),
}


def needed() -> Iterator[Right]:
    for (group, resource), verbs in GRANTED.items():
        yield from ((group, resource, verb) for verb in verbs)


def covers(rules: Iterable[Plain], right: Right) -> bool:
    """Whether one of the rules of a SelfSubjectRulesReview grants it for objects of any name."""
    keys = ("apiGroups", "resources", "verbs")
    return any(
        not rule.get("resourceNames")
        and all(word in rule.get(key, []) or "*" in rule.get(key, []) for key, word in zip(keys, right, strict=True))
        for rule in rules
    )


def review(namespace: str, right: Right) -> Plain:
    """The question about one right, which every account may ask about itself."""
    group, resource, verb = right
    asked = {"namespace": namespace, "group": group, "resource": resource, "verb": verb}
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }


def rules_review(namespace: str) -> Plain:
    """The question about all rights at once; its answer may leave out some that there are."""
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }


def missing(rights: Iterable[Right]) -> Iterator[str]:
    """What may not be done, a phrase for each resource."""
    verbs: dict[str, list[str]] = {}
    for group, resource, verb in rights:
        verbs.setdefault(f"{resource}.{group}".rstrip("."), []).append(verb)
    yield from (f"{', '.join(which)} {resource}" for resource, which in verbs.items())

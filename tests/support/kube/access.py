"""What an account may do on the simulated API server, and what the server says about itself."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field

from everstep.launch.schedulers.kubernetes.rbac import GRANTED, Right
from support.kube.object_store import ApiError, Plain

VERSION = {"major": "1", "minor": "36", "gitVersion": "v1.36.2"}
VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}


@dataclass
class Rights:
    """Everything is allowed but what is in `denied`; with `hides`, a list of all rules comes empty and says so."""

    denied: set[Right] = field(default_factory=set)
    hides: bool = False
    groups: dict[str, list[str]] = field(default_factory=lambda: {"batch": ["v1"]})
    """API groups and their versions."""

    def check(self, right: Right) -> None:
        if right in self.denied:
            group, resource, verb = right
            raise ApiError(403, "Forbidden", f'{resource} is forbidden: User "u" cannot {verb} resource "{resource}" '
                           f'in API group "{group}"')  # fmt: skip

    def answer(self, path: str, body: Plain | None) -> Plain | None:
        """To questions about the server and the account itself; None for all others."""
        if path == "/version":
            return VERSION
        if path == "/apis":
            groups = [_group(name, versions) for name, versions in self.groups.items()]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path.startswith("/apis/authorization.k8s.io/v1/") and body is not None:
            return {**body, "status": self._review(body)}
        return None

    def _review(self, body: Plain) -> Plain:
        if body["kind"] == "SelfSubjectAccessReview":
            asked = body["spec"]["resourceAttributes"]
            return {"allowed": (asked["group"], asked["resource"], asked["verb"]) not in self.denied}
        rules = [{"apiGroups": [group], "resources": [resource], "verbs": allowed}
                 for (group, resource), verbs in GRANTED.items()
                 if (allowed := [verb for verb in verbs if (group, resource, verb) not in self.denied])]  # fmt: skip
        return {"resourceRules": [] if self.hides else rules, "nonResourceRules": [], "incomplete": self.hides}


def _group(name: str, versions: list[str]) -> Plain:
    known = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": known, "preferredVersion": known[0]}


def right_of(method: str, path: str, plural: str, name: str, query: Plain) -> Right:
    words = urllib.parse.urlparse(path).path.strip("/").split("/")
    group = words[1] if words[0] == "apis" else ""
    read = "get" if name else "watch" if query.get("watch") in ("1", "true") else "list"
    return group, plural, VERBS.get(method, read)

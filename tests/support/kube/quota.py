"""ResourceQuotas of the simulated control plane: what a namespace uses of them, and which pod is too much."""

from __future__ import annotations

from support.kube.object_store import ApiError, Plain, Store, key_of
from support.kube.quantities import number, requests, words

HAS_TO_BE_SAID = ("cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory")
"""Under a quota of one of these a pod has to say how much it needs; of devices silence is none."""


class Quotas:
    def __init__(self, store: Store) -> None:
        self.store = store

    def sync(self) -> None:
        """What is used stands in each quota."""
        for quota in self._all():
            status = {"hard": quota["spec"]["hard"], "used": self._used(quota)}
            if quota.get("status") != status:
                self.store.put(key_of(quota), {**quota, "status": status})

    def check(self, pod: Plain) -> None:
        """ApiError 403 in the words of a real server for a pod that is too much, or that does not say what it needs."""
        name = pod["metadata"]["name"]
        for quota in self._all(pod["metadata"]["namespace"]):
            hard, wanted, used = quota["spec"]["hard"], _usage(pod), self._used(quota)
            if silent := sorted(key for key in hard if key in HAS_TO_BE_SAID and key not in wanted):
                container = pod["spec"]["containers"][0]["name"]
                raise _forbidden(name, f"failed quota: {quota['metadata']['name']}: must specify "
                                       f"{'; '.join(f'{key} for: {container}' for key in silent)}")  # fmt: skip
            over = [key for key in sorted(hard) if number(used[key]) + wanted.get(key, 0.0) > number(hard[key])]
            if over:
                asked = {key: words(wanted.get(key, 0.0)) for key in over}
                parts = [("requested", asked), ("used", used), ("limited", hard)]
                said = ", ".join(f"{what}: {_pairs(amounts, over)}" for what, amounts in parts)
                raise _forbidden(name, f"exceeded quota: {quota['metadata']['name']}, {said}")

    def _all(self, namespace: str = "") -> list[Plain]:
        return self.store.list("resourcequotas", namespace, lambda quota: "hard" in quota.get("spec", {}))

    def _used(self, quota: Plain) -> dict[str, str]:
        pods = self.store.list("pods", quota["metadata"]["namespace"],
                               lambda pod: pod["status"]["phase"] in ("Pending", "Running"))  # fmt: skip
        usages = [_usage(pod) for pod in pods]
        return {key: words(sum(usage.get(key, 0.0) for usage in usages)) for key in quota["spec"]["hard"]}


def _usage(pod: Plain) -> dict[str, float]:
    limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
    asked = requests(pod)
    return {"pods": 1.0, "count/pods": 1.0, **asked, **{f"requests.{key}": value for key, value in asked.items()},
            **{f"limits.{key}": number(value) for key, value in limits.items()}}  # fmt: skip


def _pairs(amounts: dict[str, str], keys: list[str]) -> str:
    return ",".join(f"{key}={amounts[key]}" for key in keys)


def _forbidden(name: str, why: str) -> ApiError:
    return ApiError(403, "Forbidden", f'pods "{name}" is forbidden: {why}')

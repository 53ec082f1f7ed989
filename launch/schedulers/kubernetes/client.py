"""API calls to a cluster, through lightkube; it is imported at the first call, never for a dry run."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from everstep.errors import ConfigError
from everstep.launch.schedulers.kubernetes.labels import MANAGER

RETRY_S = 60.0
"""Seconds for which a call to an unreachable or overloaded API server is retried."""
TIMEOUT_S = 20.0
SILENT_S = 100.0
"""Seconds of silence after which a watch counts as broken; a server sends a bookmark every minute."""
AGAIN = (429, 500, 502, 503, 504)
KINDS = {
    "Job": ("batch", "v1", "jobs"),
    "Pod": ("", "v1", "pods"),
    "Service": ("", "v1", "services"),
    "ConfigMap": ("", "v1", "configmaps"),
    "NetworkPolicy": ("networking.k8s.io", "v1", "networkpolicies"),
    "JobSet": ("jobset.x-k8s.io", "v1alpha2", "jobsets"),
    "TrainJob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
}
Plain = dict[str, Any]
Things = list[Plain]
Listed = tuple[Things, str]
"""Objects, and the resource version of the list."""
T = TypeVar("T")


class Refused(ConfigError):
    """The API server has refused the request; `code` is the HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """One cluster and namespace. All objects are plain mappings, so an overlay's fields pass unchanged.

    Raises:
        ConfigError: unknown context, no permission, or no answer for `retry_s` seconds.
    """

    def __init__(self, context: str | None, namespace: str | None, retry_s: float = RETRY_S) -> None:
        self.retry_s = retry_s
        self._kube, self._watches = _connect(context)
        self.namespace: str = namespace or str(self._kube.namespace)

    def apply(self, thing: Plain) -> Plain:
        """Apply an object on the server side; idempotent, so a call whose answer was lost can be repeated."""
        made = _resource(thing["kind"])(thing)
        return dict(
            self._ask(lambda: self._kube.apply(made, namespace=self.namespace, field_manager=MANAGER, force=True))
        )

    def get(self, kind: str, name: str) -> Plain | None:
        try:
            return dict(self._ask(lambda: self._kube.get(_resource(kind), name, namespace=self.namespace)))
        except Refused as error:
            if error.code == 404:
                return None
            raise

    def list(self, kind: str, labels: Mapping[str, str]) -> list[Plain]:
        """Return all objects by one call; an unknown kind has none."""
        return self.listed(kind, labels)[0]

    def listed(self, kind: str, labels: Mapping[str, str]) -> Listed:
        """Return all objects and the version of the list, from which a watch continues."""
        wanted: Any = {key: value or _exists() for key, value in labels.items()}

        def question() -> Listed:
            found = self._kube.list(_resource(kind), namespace=self.namespace, labels=wanted)
            return [dict(each) for each in found], str(found.resourceVersion)

        try:
            return self._ask(question)
        except Refused as error:
            if error.code == 404:
                return [], "0"
            raise

    @contextlib.contextmanager
    def watch(self, kind: str, labels: Mapping[str, str], version: str) -> Iterator[Iterator[tuple[str, Plain]]]:
        """Yield the events after `version`, over one connection, until the server ends it.

        Raises:
            Refused: with code 410 if the history since that version is gone.
            ConnectionError: the connection failed, broke, or was silent for SILENT_S seconds.
        """
        import httpx2

        wanted = ",".join(f"{key}={value}" if value else key for key, value in labels.items())
        query = {"watch": "1", "resourceVersion": version, "labelSelector": wanted, "allowWatchBookmarks": "true"}
        try:
            with self._watches.stream("GET", _path(kind, self.namespace), params=query) as response:
                if response.status_code >= 400:
                    said = response.read().decode(errors="replace").strip()
                    raise Refused(response.status_code, f"Kubernetes refuses it ({response.status_code}): {said}")
                yield _events(response.iter_lines())
        except httpx2.HTTPError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error

    @property
    def server(self) -> str:
        return str(self._kube.config.cluster.server)

    def read(self, path: str) -> Plain | None:
        """Return the object at any path, also a cluster-wide one; None if there is none."""
        try:
            return self._request("GET", path)
        except Refused as error:
            if error.code == 404:
                return None
            raise

    def items(self, path: str) -> Things:
        """Return all objects of a kind by one call."""
        found: Things = (self.read(path) or {}).get("items") or []
        return found

    def create(self, path: str, thing: Plain) -> Plain:
        return self._request("POST", path, thing)

    def remove(self, path: str) -> None:
        self._request("DELETE", path)

    def change(self, path: str, patch: Plain) -> Plain:
        """Apply a merge patch; lists are replaced as a whole.

        Raises:
            Refused: with code 409 if the version in the patch is not the newest.
        """
        return self._request("PATCH", path, patch, "application/merge-patch+json")

    def own(self, kind: str, name: str, owner: Plain) -> None:
        """Make `owner` the owner, with which the object is deleted."""
        patch = {"metadata": {"ownerReferences": [owned_by(owner)]}}
        self._ask(lambda: self._kube.patch(_resource(kind), name, patch, namespace=self.namespace, patch_type=_merge()))

    def delete(self, kind: str, name: str) -> None:
        """Delete the object with all that it owns; one that is gone already is no error."""
        try:
            self._ask(lambda: self._kube.delete(_resource(kind), name, namespace=self.namespace, cascade=_foreground()))
        except Refused as error:
            if error.code != 404:
                raise

    def _request(self, method: str, path: str, body: Plain | None = None, kind: str = "application/json") -> Plain:
        import httpx2

        def question() -> Plain:
            headers = {"Content-Type": kind}
            response = self._watches.request(method, path, json=body, headers=headers, timeout=TIMEOUT_S)
            if response.is_error:
                raise httpx2.HTTPStatusError(_said(response), request=response.request, response=response)
            found: Plain = response.json()
            return found

        # After a conflict (409, 410) the object must be read again: repeating the request does not help.
        return self._ask(question, AGAIN)

    def _ask(self, question: Callable[[], T], again: Sequence[int] = (*AGAIN, 409, 410)) -> T:
        """Repeat the call with growing pauses while the server is away or overloaded, or after a conflict."""
        import httpx2

        pause, deadline = 0.5, time.monotonic() + self.retry_s
        while True:
            try:
                return question()
            except httpx2.HTTPStatusError as error:
                code = error.response.status_code
                if code not in again or time.monotonic() + pause > deadline:
                    raise Refused(code, f"Kubernetes refuses it ({code}): {error}") from error
                pause = _asked_to_wait(error.response) or pause
            except httpx2.HTTPError as error:
                if time.monotonic() + pause > deadline:
                    where = f"the API server {self.server}"
                    raise ConfigError(f"{where} has not answered for {self.retry_s:.0f} s: {error}") from error
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(10.0, 2 * pause)


def owned_by(owner: Plain) -> Plain:
    """Return the reference with which an object is deleted together with `owner`."""
    metadata = owner["metadata"]
    return {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": metadata["name"], "uid": metadata["uid"]}


def _said(response: Any) -> str:
    """Return the message of a refusal: a Status, or the plain text of a proxy before the server."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return str(response.text.strip()[:200])


def _asked_to_wait(response: Any) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def _path(kind: str, namespace: str) -> str:
    group, version, plural = KINDS[kind]
    return f"{f'apis/{group}' if group else 'api'}/{version}/namespaces/{namespace}/{plural}"


def _events(lines: Iterable[str]) -> Iterator[tuple[str, Plain]]:
    """Yield the events of a watch, one JSON object per line; a truncated line is a broken connection."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ConnectionError("cut in the middle of a word") from error
        thing = event["object"]
        if event["type"] == "ERROR":
            raise Refused(int(thing.get("code", 500)), f"Kubernetes ends the watch: {thing.get('message', thing)}")
        yield event["type"], thing


def _connect(context: str | None) -> tuple[Any, Any]:
    """Return a client for calls and one for watches, which may be silent for longer."""
    try:
        import httpx2
        from lightkube import Client as Kube
        from lightkube import KubeConfig
        from lightkube.config.client_adapter import Client as Watches
        from lightkube.config.client_adapter import ConnectionParams
        from lightkube.core.exceptions import ConfigError as NoConfig
    except ImportError as error:
        raise ConfigError("job=k8s needs lightkube; pip install 'everstep[kubernetes]'") from error
    try:
        config = KubeConfig.from_env()
        if context is not None and context not in config.contexts:
            raise ConfigError(f"job.k8s.context={context!r}: the kubeconfig has {', '.join(config.contexts) or 'none'}")
        one: Any = config.get(context_name=context)  # None only where a default was given
        patient = ConnectionParams(timeout=httpx2.Timeout(TIMEOUT_S, read=SILENT_S), trust_env=False)
        return Kube(config=one, timeout=httpx2.Timeout(TIMEOUT_S), trust_env=False), Watches(one, patient)
    except NoConfig as error:
        raise ConfigError(
            f"no cluster can be reached from here ({error}); set KUBECONFIG, or job.k8s.context"
        ) from error


@functools.cache
def _resource(kind: str) -> Any:
    from lightkube.generic_resource import create_namespaced_resource

    group, version, plural = KINDS[kind]
    return create_namespaced_resource(group, version, kind, plural)


def _exists() -> Any:
    from lightkube import operators

    return operators.exists()


def _merge() -> Any:
    from lightkube.types import PatchType

    return PatchType.MERGE


def _foreground() -> Any:
    from lightkube.types import CascadeType

    return CascadeType.FOREGROUND

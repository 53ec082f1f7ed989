"""The simulated API server: HTTP on loopback, for the kinds that a job needs."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlparse

from kube_admission import admit
from kube_queue import pending
from kube_rights import Rights, right_of
from kube_store import ApiError, Key, Plain, Store

KINDS = {"pods": "Pod", "services": "Service", "configmaps": "ConfigMap", "jobs": "Job", "nodes": "Node",
         "namespaces": "Namespace", "resourcequotas": "ResourceQuota",
         "persistentvolumeclaims": "PersistentVolumeClaim", "storageclasses": "StorageClass",
         "localqueues": "LocalQueue", "workloads": "Workload", "secrets": "Secret", "events": "Event"}  # fmt: skip
IMMUTABLE = ("completionMode", "template", "selector", "backoffLimitPerIndex", "podFailurePolicy", "successPolicy")


class Server:
    """`away` drops every connection; `busy` is how many requests are answered with 429 next. A change of `cuts` ends
    all watches in the middle of a word. `watches` counts those that began, `listeners` those that go on, `gone` those
    that began too late."""

    def __init__(self, store: Store, bookmark_s: float = 60.0) -> None:
        self.store, self.bookmark_s = store, bookmark_s
        self.away, self.over = threading.Event(), threading.Event()
        self.rights = Rights()
        self.busy = self.cuts = self.watches = self.listeners = self.gone = 0
        self.requests: list[str] = []
        self.logs: Any = lambda namespace, pod: ""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def handle_one(self) -> None:
                server.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        length = int(http.headers.get("Content-Length") or 0)
        body = json.loads(http.rfile.read(length)) if length else None
        if self.away.is_set():
            http.close_connection = True
            return None
        self.requests.append(f"{http.command} {urlparse(http.path).path}")
        try:
            if self.busy > 0:
                self.busy -= 1
                raise ApiError(429, "TooManyRequests", "too many requests, please try again later")
            found = self._do(http, body)
        except ApiError as error:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": error.code,
                      "reason": error.reason, "message": str(error)}  # fmt: skip
            return _send(http, error.code, status)
        if found is not None:
            _send(http, 201 if http.command == "POST" else 200, found)
        return None

    def _do(self, http: BaseHTTPRequestHandler, body: Any) -> Plain | str | None:
        url = urlparse(http.path)
        query = dict(parse_qsl(url.query))
        if (told := self.rights.answer(url.path, body)) is not None:
            return told
        plural, namespace, name, sub = _parse(url.path)
        self.rights.check(right_of(http.command, http.path, plural, name, query))
        key = (plural, namespace, name)
        if http.command == "GET":
            if sub == "log":
                return str(self.logs(namespace, name))
            if sub == "pendingworkloads":
                return pending(self.store, namespace, name)
            if name:
                return self.store.get(key)
            if query.get("watch") in ("1", "true"):
                return self._watch(http, plural, namespace, query)
            items = self.store.list(plural, namespace, _labels(query.get("labelSelector", "")))
            return {"kind": f"{KINDS[plural]}List", "apiVersion": "v1", "items": items,
                    "metadata": {"resourceVersion": str(self.store.version)}}  # fmt: skip
        if http.command == "DELETE":
            return self.delete(key, body or {}, query)
        if http.command == "POST" and sub == "eviction":
            return self.evict(key)
        if http.command == "POST" and query.get("dryRun") == "All":
            admit(body)
            return dict(body)
        if http.command == "POST":
            return self.create((plural, namespace, body["metadata"]["name"]), body)
        if http.command == "PUT":
            return self._replace(key, body)
        return self._patch(http, key, body)

    def create(self, key: Key, thing: Plain) -> Plain:
        admit(thing)
        made = {**thing, "status": thing.get("status", {})}
        return self.store.create(key, made)

    def evict(self, key: Key) -> Plain:
        """As a drain does it: the pod is marked, so that no policy counts it, and then ended."""
        self.mark(key, "EvictionByEvictionAPI")
        return self.delete(key, {}, {})

    def mark(self, key: Key, reason: str) -> None:
        with self.store.changed:
            pod = self.store.get(key)
            pod["status"].setdefault("conditions", []).append(
                {"type": "DisruptionTarget", "status": "True", "reason": reason}
            )
            self.store.put(key, pod)

    def delete(self, key: Key, options: Plain, query: Plain) -> Plain:
        if key[0] == "namespaces":
            self._empty(key[2])
        thing = self.store.get(key)
        grace = thing.get("spec", {}).get("terminationGracePeriodSeconds", 30) if key[0] == "pods" else 0
        grace = float(options.get("gracePeriodSeconds", query.get("gracePeriodSeconds", grace)))
        policy = options.get("propagationPolicy") or query.get("propagationPolicy")
        if policy == "Foreground" and key[0] == "jobs":
            with self.store.changed:
                thing = self.store.get(key)
                thing["metadata"].setdefault("finalizers", []).append("foregroundDeletion")
                self.store.put(key, thing)
        return self.store.delete(key, grace)

    def _empty(self, namespace: str) -> None:
        for plural in KINDS:
            for each in self.store.list(plural, namespace):
                with contextlib.suppress(ApiError):  # its owner has taken it along
                    self.delete((plural, namespace, each["metadata"]["name"]), {"propagationPolicy": "Foreground"}, {})

    def _replace(self, key: Key, thing: Plain) -> Plain:
        admit(thing)
        return self.store.put(key, {**thing, "status": self.store.get(key).get("status", {})})

    def _patch(self, http: BaseHTTPRequestHandler, key: Key, patch: Plain) -> Plain:
        applied = "apply-patch" in http.headers.get("Content-Type", "")
        with self.store.changed:
            try:
                old = self.store.get(key)
            except ApiError:
                if not applied:
                    raise
                return self.create(key, patch)
            new = _merged(old, patch)
            if applied and key[0] == "jobs":
                _refuse_changes(old, new)
            return self.store.put(key, new)

    def _watch(self, http: BaseHTTPRequestHandler, plural: str, namespace: str, query: Plain) -> None:
        """What comes after a version, until the connection is cut. A version that is forgotten is an event of its own
        in a watch that was accepted, and no refusal."""
        self.watches += 1
        http.send_response(200)
        http.send_header("Content-Type", "application/json")
        http.end_headers()
        http.close_connection = True
        with self.store.changed:
            self.listeners += 1
        try:
            self._tell(http, plural, namespace, query)
        except OSError:
            pass  # nobody listens any more
        finally:
            with self.store.changed:
                self.listeners -= 1

    def _tell(self, http: BaseHTTPRequestHandler, plural: str, namespace: str, query: Plain) -> None:
        version, labels = int(query.get("resourceVersion") or 0), _labels(query.get("labelSelector", ""))
        cuts, told_at = self.cuts, time.monotonic()
        if version < self.store.forgotten:
            self.gone += 1
            return _write(http, _error(410, "Expired", f"too old resource version: {version}"))
        while not self.away.is_set() and not self.over.is_set():
            if cuts != self.cuts:
                http.wfile.write(b'{"type": "MODIFIED", "obj')
                return None
            with self.store.changed:
                found, newest = list(self.store.since(version, plural, namespace, labels)), self.store.version
                if not found:
                    self.store.changed.wait(0.1)
            for _, what, thing in found:
                _write(http, {"type": what, "object": thing})
            version = newest
            if time.monotonic() - told_at > self.bookmark_s and query.get("allowWatchBookmarks") == "true":
                told_at = time.monotonic()
                meta = {"resourceVersion": str(version)}
                _write(http, {"type": "BOOKMARK", "object": {"kind": KINDS[plural], "metadata": meta}})
        return None


def _parse(path: str) -> tuple[str, str, str, str]:
    words = path.strip("/").split("/")
    words = words[2:] if words[0] == "api" else words[3:]
    namespace = ""
    if words[:1] == ["namespaces"] and len(words) > 2:
        namespace, words = words[1], words[2:]
    plural, name, sub = [*words, "", "", ""][:3]
    if plural not in KINDS:
        raise ApiError(404, "NotFound", "the server could not find the requested resource")
    return plural, namespace, name, sub


def _labels(text: str) -> Plain:
    pairs = [word.partition("=") for word in text.split(",") if word]
    return {key: value if equals else None for key, equals, value in pairs}


def _merged(old: Any, patch: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(patch, dict):
        return patch
    merged = {key: value for key, value in old.items() if patch.get(key, value) is not None}
    return merged | {key: _merged(old.get(key), value) for key, value in patch.items() if value is not None}


def _refuse_changes(old: Plain, new: Plain) -> None:
    for field in IMMUTABLE:
        if old["spec"].get(field) != new["spec"].get(field):
            raise ApiError(422, "Invalid", f"spec.{field}: Invalid value: field is immutable")


def _send(http: BaseHTTPRequestHandler, code: int, found: Plain | str) -> None:
    data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
    with contextlib.suppress(OSError):
        http.send_response(code)
        http.send_header("Content-Type", "text/plain" if isinstance(found, str) else "application/json")
        http.send_header("Content-Length", str(len(data)))
        if code == 429:
            http.send_header("Retry-After", "1")
        http.end_headers()
        http.wfile.write(data)


def _error(code: int, reason: str, message: str) -> Plain:
    return {"type": "ERROR", "object": {"kind": "Status", "code": code, "reason": reason, "message": message}}


def _write(http: BaseHTTPRequestHandler, event: Plain) -> None:
    http.wfile.write(json.dumps(event).encode() + b"\n")
    http.wfile.flush()

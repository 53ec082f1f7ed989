"""The simulated API server: HTTP on loopback, for the kinds that a job needs."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlparse

from support.kube.access import Rights, right_of
from support.kube.admission import admit
from support.kube.kueue import pending
from support.kube.object_store import ApiError, Key, Plain, Store, set_condition
from support.kube.query import KINDS, parse, selected
from support.kube.wire import AGENT

STATELESS = ("configmaps", "events", "leases", "networkpolicies", "secrets")
NODES = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
)
"""How nodes are asked for logs: whose certificate they show is not looked at, as by default on a real server."""
IMMUTABLE = ("completionMode", "template", "selector", "backoffLimitPerIndex", "podFailurePolicy", "successPolicy")


class Server:
    """What node agents ask is answered like all else, but counted nowhere: only they are always there.

    `away` drops every connection; `busy` is how many requests are answered with 429 next. A change of `cuts` ends
    all watches in the middle of a word. `watches` counts those that began, `listeners` those that go on, `gone` those
    that began too late."""

    def __init__(self, store: Store, bookmark_s: float = 60.0, certificate: tuple[str, str] | None = None) -> None:
        self.store, self.bookmark_s = store, bookmark_s
        self.away, self.over = threading.Event(), threading.Event()
        self.rights = Rights()
        self.busy = self.cuts = self.watches = self.listeners = self.gone = 0
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def handle_one(self) -> None:
                server.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._scheme = "http" if certificate is None else "https"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            context.load_verify_locations(certificate[0])
            context.verify_mode = ssl.CERT_REQUIRED
            # The handshake belongs to the thread of each connection: a stranger holds nobody up.
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._http.server_port}"

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
        if not _is_node(http):
            self.requests.append(f"{http.command} {urlparse(http.path).path}")
        try:
            if self.busy > 0 and not _is_node(http):  # nodes have a lane of their own
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
        if url.path.startswith("/simulation/"):
            return self._ruled(url.path)
        if (told := self.rights.answer(url.path, body)) is not None:
            return told
        plural, namespace, name, sub = parse(url.path)
        if not _is_node(http):
            self.rights.check(right_of(http.command, http.path, plural, name, query))
        key = (plural, namespace, name)
        if http.command == "GET":
            if sub == "log":
                return self._log(key)
            if sub == "pendingworkloads":
                return pending(self.store, namespace, name)
            if name:
                return self.store.get(key)
            if query.get("watch") in ("1", "true"):
                return self._watch(http, plural, namespace, query)
            with self.store.changed:
                return {"kind": f"{KINDS[plural]}List", "apiVersion": "v1",
                        "items": [_untyped(each) for each in self.store.list(plural, namespace, selected(query))],
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
        if sub == "status":
            return self._report(key, body)
        return self._patch(http, key, body)

    def _ruled(self, path: str) -> Plain:
        """No real server has this: its history is lost, and how many watches have begun too late."""
        if path == "/simulation/forget":
            self.store.touch()
            self.store.forget()
        return {"watches": self.gone}

    def create(self, key: Key, thing: Plain) -> Plain:
        admit(thing)
        made = dict(thing) if key[0] in STATELESS else {**thing, "status": thing.get("status", {})}
        if key[0] == "nodes":
            made.setdefault("spec", {})
        return self.store.create(key, made)

    def evict(self, key: Key) -> Plain:
        """As a drain does it: the pod is marked, so that no policy counts it, and then ended."""
        self.mark(key, "EvictionByEvictionAPI")
        return self.delete(key, {}, {})

    def mark(self, key: Key, reason: str) -> None:
        with self.store.changed:
            pod = self.store.get(key)
            set_condition(pod, {"type": "DisruptionTarget", "status": "True", "reason": reason})
            self.store.put(key, pod)

    def delete(self, key: Key, options: Plain, query: Plain) -> Plain:
        if key[0] == "namespaces":
            self._empty(key[2])
        thing = self.store.get(key)
        if options.get("preconditions", {}).get("uid", thing["metadata"]["uid"]) != thing["metadata"]["uid"]:
            raise ApiError(409, "Conflict", f'{key[0]} "{key[2]}" is another one by now')
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

    def _report(self, key: Key, patch: Plain) -> Plain:
        """What a node says of itself and of its pods; conditions of other types stay as they are."""
        with self.store.changed:
            thing = self.store.get(key)
            if patch.get("metadata", {}).get("uid", thing["metadata"]["uid"]) != thing["metadata"]["uid"]:
                raise ApiError(409, "Conflict", f'{key[0]} "{key[2]}" is another one by now')
            for condition in patch["status"].get("conditions", []):
                set_condition(thing, condition)
            thing["status"] |= {name: value for name, value in patch["status"].items() if name != "conditions"}
            return self.store.put(key, thing)

    def _log(self, key: Key) -> str:
        """The node is asked; nobody knows the log of a pod that is gone from there."""
        pod = self.store.get(key)
        node = self.store.get(("nodes", "", pod["spec"].get("nodeName", "")))
        port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
        path = f"containerLogs/{key[1]}/{key[2]}/{pod['spec']['containers'][0]['name']}"
        try:
            with NODES.open(f"{self._scheme}://127.0.0.1:{port}/{path}", timeout=10) as answer:
                return str(answer.read().decode(errors="replace"))
        except OSError as error:  # the node is off, or has lost the pod
            raise ApiError(502, "BadGateway", str(error)) from error

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
        counts = 0 if _is_node(http) else 1
        self.watches += counts
        http.send_response(200)
        http.send_header("Content-Type", "application/json")
        http.end_headers()
        http.close_connection = True
        with self.store.changed:
            self.listeners += counts
        try:
            self._tell(http, plural, namespace, query)
        except OSError:
            pass  # nobody listens any more
        finally:
            with self.store.changed:
                self.listeners -= counts

    def _tell(self, http: BaseHTTPRequestHandler, plural: str, namespace: str, query: Plain) -> None:
        version, fits = int(query.get("resourceVersion") or 0), selected(query)
        cuts, told_at = self.cuts, time.monotonic()
        if version < self.store.forgotten:
            self.gone += not _is_node(http)
            return _write(http, _error(410, "Expired", f"too old resource version: {version}"))
        while not self.away.is_set() and not self.over.is_set():
            if cuts != self.cuts:
                http.wfile.write(b'{"type": "MODIFIED", "obj')
                return None
            with self.store.changed:
                found, newest = list(self.store.since(version, plural, namespace, fits)), self.store.version
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


def _untyped(thing: Plain) -> Plain:
    """As an element of a list: what it is only the list says."""
    return {key: value for key, value in thing.items() if key not in ("kind", "apiVersion")}


def _is_node(http: BaseHTTPRequestHandler) -> bool:
    return http.headers.get("User-Agent") == AGENT


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

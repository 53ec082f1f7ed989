"""An API server as a kubeconfig says how to reach it, by the standard library alone: a node's agent starts at once."""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Plain = dict[str, Any]
AGENT = "everstep-node-agent"
"""How an agent calls itself. The simulated server keeps its requests apart from those that tests count."""
MERGE = "application/strategic-merge-patch+json"
TIMEOUT_S = 20.0
SILENT_S = 300.0


class Refused(Exception):
    """The server answers, and says no; `code` is HTTP's."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"{code}: {said}")
        self.code = code


class Wire:
    """Raises Refused, or OSError where nobody answers."""

    def __init__(self, kubeconfig: Path, agent: str = AGENT) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        context = _named(config["contexts"], config["current-context"])["context"]
        cluster = _named(config["clusters"], context["cluster"])["cluster"]
        user = _named(config["users"], context["user"])["user"]
        self.url = cluster["server"].rstrip("/")
        self.tls = None if self.url.startswith("http:") else _tls(cluster, user)
        self._headers = {"User-Agent": agent}
        if "token" in user:
            self._headers["Authorization"] = f"Bearer {user['token']}"
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self.tls is not None:
            handlers.append(urllib.request.HTTPSHandler(context=self.tls))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, method: str, path: str, body: Plain | None = None, kind: str = "application/json") -> Plain:
        with self._open(method, path, body, kind, TIMEOUT_S) as answer:
            found: Plain = json.loads(answer.read())
            return found

    def watch(self, path: str) -> Iterator[tuple[str, Plain]]:
        """What happens to what is at `path`, until the server ends it."""
        with self._open("GET", path, None, "application/json", SILENT_S) as answer:
            for line in answer:
                event = json.loads(line)
                yield event["type"], event["object"]

    def _open(self, method: str, path: str, body: Plain | None, kind: str, timeout_s: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({} if data is None else {"Content-Type": kind})}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            return self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(error.code, error.read(400).decode(errors="replace")) from error


def _named(things: list[Plain], name: str) -> Plain:
    return next(each for each in things if each["name"] == name)


def _tls(cluster: Plain, user: Plain) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=_file(cluster, "certificate-authority"))
    if cluster.get("insecure-skip-tls-verify"):
        made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if certificate := _file(user, "client-certificate"):
        made.load_cert_chain(certificate, _file(user, "client-key"))
    return made


def _file(where: Plain, key: str) -> str | None:
    """Certificates stand in a kubeconfig itself, or in a file that it names; OpenSSL takes files alone."""
    if f"{key}-data" not in where:
        return where.get(key)
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(base64.b64decode(where[f"{key}-data"]))
    return file.name

"""Stands between a launcher and any API server, and can be cut: nodes and controllers notice nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import yaml

from support.kube.wire import Wire


class Between:
    """`kubeconfig` is the same cluster by another way. What it says in plain text here goes on over the server's
    TLS, and certificates are shown there; a token is what the launcher itself sends."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        server = Wire(kubeconfig)
        url = urlparse(server.url)
        self._tls, self._host = server.tls, url.hostname or ""
        self._port = url.port or (80 if server.tls is None else 443)
        self._away, self._lock = threading.Event(), threading.Lock()
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.kubeconfig = folder / "kubeconfig-between"
        self.kubeconfig.write_text(_through(kubeconfig, self._listening.getsockname()[1]))
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """All connections break, in the middle of a word where there is one."""
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self._away.set()
        self.cut()
        try:
            yield
        finally:
            self._away.clear()

    def close(self) -> None:
        self._away.set()
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self._away.is_set():
                client.close()
                continue
            try:
                server = socket.create_connection((self._host, self._port), timeout=10)
                server.settimeout(None)
                if self._tls is not None:
                    server = self._tls.wrap_socket(server, server_hostname=self._host)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
                if self._away.is_set():  # a cut that came while this one was being made has not seen it
                    with contextlib.suppress(OSError):
                        client.shutdown(socket.SHUT_RDWR)
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open -= {one, other}


def _through(kubeconfig: Path, port: int) -> str:
    """The current context with our address; the launcher has no use for certificates on the way to us."""
    config = yaml.safe_load(kubeconfig.read_text())
    context = next(each["context"] for each in config["contexts"] if each["name"] == config["current-context"])
    for each in config["clusters"]:
        if each["name"] == context["cluster"]:
            each["cluster"] = {"server": f"http://127.0.0.1:{port}"}
    for each in config["users"]:
        each["user"] = {key: value for key, value in each["user"].items() if not key.startswith("client-")}
    return str(yaml.safe_dump(config))

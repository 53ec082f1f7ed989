"""The logs of a node's pods, as an API server asks a kubelet for them."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path


def logs_of(find: Callable[[str, str], Path | None]) -> type[BaseHTTPRequestHandler]:
    class Logs(BaseHTTPRequestHandler):
        """GET /containerLogs/NAMESPACE/POD/CONTAINER."""

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            words = self.path.partition("?")[0].strip("/").split("/")
            log = find(words[1], words[2]) if len(words) == 4 and words[0] == "containerLogs" else None
            data = b"" if log is None else log.read_bytes()
            self.send_response(404 if log is None else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Logs

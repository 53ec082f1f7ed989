"""HTTP server of `everstep ui`: read-only, on the loopback address, for holders of the token.

Every program and every web page on this machine can reach a port of 127.0.0.1. So each request must carry the token,
and the name by which the server was asked: a page elsewhere whose name resolves to 127.0.0.1 has another one.
"""

from __future__ import annotations

import hmac
import http.cookies
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from everstep.errors import ConfigError, EverstepError, printable
from everstep.launch.top.table import RunTable
from everstep.launch.ui.pages import Page, metrics_page, run_page, runs_page

LOOPBACK = "127.0.0.1"
COOKIE = "everstep_token"


class UiServer(ThreadingHTTPServer):
    """Server of the runs below one folder; `url` has the token."""

    daemon_threads = True

    def __init__(self, root: str, port: int) -> None:
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error
        self.table = RunTable(root)
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: UiServer
    server_version = "everstep"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a request that has the token."""
        if self.headers.get("Host") not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers to 127.0.0.1 alone")
            return
        asked = urlsplit(self.path)
        given = parse_qs(asked.query).get("token", [""])[0]
        if given and self._is_token(given) and asked.path != "/metrics":
            self._keep_token(asked.path)
        elif self._is_token(given) or self._is_token(self._bearer()) or self._is_token(self._cookie()):
            self._show(asked.path)
        else:
            self._refuse(HTTPStatus.FORBIDDEN, "the token is missing; open the address that everstep ui has printed")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _bearer(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _cookie(self) -> str:
        try:
            found = http.cookies.SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except http.cookies.CookieError:
            return ""
        return "" if found is None else found.value

    def _keep_token(self, path: str) -> None:
        """Put the token into a cookie and leave it out of the address, which a browser keeps and shows."""
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/" + path.lstrip("/"))  # not //elsewhere
        self.send_header("Set-Cookie", f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _show(self, path: str) -> None:
        table = self.server.table
        pages: dict[str, Callable[[], Page]] = {
            "/": lambda: runs_page(table),
            "/metrics": lambda: metrics_page(table),
        }
        if path not in pages and not path.startswith("/run/"):
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
            return
        made = pages.get(path, lambda: run_page(table.root, unquote(path.removeprefix("/run/"))))
        try:
            self._answer(HTTPStatus.OK, made())
        except (OSError, EverstepError) as error:
            self._refuse(HTTPStatus.NOT_FOUND, printable(str(error)))

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._answer(status, Page(f"{why}\n", "text/plain; charset=utf-8"))

    def _answer(self, status: HTTPStatus, page: Page) -> None:
        body = page.text.encode()
        self.send_response(status)
        self.send_header("Content-Type", page.kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if page.refresh_s is not None:
            self.send_header("Refresh", str(page.refresh_s))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the addresses hold the token."""

"""A proxy in front of an HTTP store that is slow, fails and lies as it is told; it runs in a process of its own.

    with fault_proxy(port_of_the_store) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.delay_s = 0.02                          # latency of every request, until it is set to 0
        proxy.fail(status=503, times=3)               # the next three requests
        proxy.reset(after=1000, method="GET")         # the next GET breaks after 1000 bytes of the body
        …
        assert [request.fault for request in proxy.requests] == …

Faults are used in the order in which they were set, by the first requests that fit their method and path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADMIN = "/-/proxy"


@dataclass
class Fault:
    kind: str
    """fail, reset, reset_up, truncate, corrupt, hang, slow, stale or lose."""
    value: float = 0
    """Status, bytes that pass, byte that is changed, or seconds."""
    times: int = 1
    method: str = ""
    path: str = ""
    """What the request's path has to contain."""


@dataclass
class Request:
    """What went through the proxy."""

    method: str
    path: str
    range: str
    """Of the Range header, `bytes=0-99`; empty without."""
    fault: str = ""


class Proxy:
    """The test's side: what it sets holds for requests that begin from now on."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def _ask(self, **change: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.url + ADMIN, json.dumps(change).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=20) as answer:
            state: dict[str, Any] = json.load(answer)
            return state

    def _fault(self, kind: str, value: float, times: int, method: str, path: str) -> None:
        self._ask(fault=asdict(Fault(kind, value, times, method, path)))

    def fail(self, status: int = 503, times: int = 1, method: str = "", path: str = "") -> None:
        """Answer with an error in place of the store."""
        self._fault("fail", status, times, method, path)

    def reset(self, after: int = 0, times: int = 1, method: str = "", path: str = "") -> None:
        """Reset the connection when `after` bytes of the answer's body have passed."""
        self._fault("reset", after, times, method, path)

    def reset_up(self, after: int = 0, times: int = 1, method: str = "", path: str = "") -> None:
        """Reset the connection when `after` bytes of the request's body have been read; none reach the store."""
        self._fault("reset_up", after, times, method, path)

    def truncate(self, keep: int, times: int = 1, method: str = "", path: str = "") -> None:
        """Give the first `keep` bytes of the body as if they were all of it."""
        self._fault("truncate", keep, times, method, path)

    def corrupt(self, at: int = 0, times: int = 1, method: str = "", path: str = "") -> None:
        """Flip a bit of byte `at` of the body."""
        self._fault("corrupt", at, times, method, path)

    def hang(self, times: int = 1, method: str = "", path: str = "") -> None:
        """Take the request and never answer."""
        self._fault("hang", 0, times, method, path)

    def slow(self, seconds: float, times: int = 1, method: str = "", path: str = "") -> None:
        """Answer later by so much."""
        self._fault("slow", seconds, times, method, path)

    def stale(self, times: int = 1, path: str = "") -> None:
        """Answer a list as it was when the same one was asked for last, as a store that is consistent late does."""
        self._fault("stale", 0, times, "GET", path)

    def lose(self, times: int = 1, method: str = "", path: str = "") -> None:
        """Let the request reach the store, and reset the connection in place of its answer."""
        self._fault("lose", 0, times, method, path)

    @property
    def delay_s(self) -> float:
        """Latency added to every request."""
        return float(self._ask()["delay_s"])

    @delay_s.setter
    def delay_s(self, seconds: float) -> None:
        self._ask(delay_s=seconds)

    @property
    def rate(self) -> float:
        """Bytes per second of all answers together; 0 for no limit."""
        return float(self._ask()["rate"])

    @rate.setter
    def rate(self, bytes_per_s: float) -> None:
        self._ask(rate=bytes_per_s)

    @property
    def rate_up(self) -> float:
        """Bytes per second of all requests' bodies together; 0 for no limit."""
        return float(self._ask()["rate_up"])

    @rate_up.setter
    def rate_up(self, bytes_per_s: float) -> None:
        self._ask(rate_up=bytes_per_s)

    @property
    def black_hole(self) -> bool:
        """Whether requests are neither read nor answered, nor those that were caught when it ends."""
        return bool(self._ask()["black_hole"])

    @black_hole.setter
    def black_hole(self, swallows: bool) -> None:
        self._ask(black_hole=swallows)

    @property
    def swallowed(self) -> int:
        """Requests that have come to the black hole."""
        return int(self._ask()["swallowed"])

    @property
    def strip(self) -> str:
        """A field that no request's head has any more when it reaches the store."""
        return str(self._ask()["strip"])

    @strip.setter
    def strip(self, name: str) -> None:
        self._ask(strip=name)

    @property
    def requests(self) -> list[Request]:
        """All that came since the last `clear`, in order of their beginning."""
        return [Request(**request) for request in self._ask()["requests"]]

    def clear(self) -> None:
        """Forget faults, latency, limits and requests."""
        self._ask(clear=True)


@contextmanager
def fault_proxy(upstream_port: int) -> Iterator[Proxy]:
    """A proxy to a server on this machine, ended with the block."""
    command = [sys.executable, "-m", "support.fault_proxy_server", str(upstream_port)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Proxy(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()

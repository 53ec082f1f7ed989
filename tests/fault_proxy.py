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

import asyncio
import json
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

ADMIN = "/-/proxy"
CHUNK = 1 << 17
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"


@dataclass
class Fault:
    kind: str
    """fail, reset, reset_up, truncate, corrupt, hang or slow."""
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
    def requests(self) -> list[Request]:
        """All that came since the last `clear`, in order of their beginning."""
        return [Request(**request) for request in self._ask()["requests"]]

    def clear(self) -> None:
        """Forget faults, latency, limits and requests."""
        self._ask(clear=True)


@contextmanager
def fault_proxy(upstream_port: int) -> Iterator[Proxy]:
    """A proxy to a server on this machine, ended with the block."""
    process = subprocess.Popen([sys.executable, __file__, str(upstream_port)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Proxy(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------- the process


class Broken(Exception):
    """The connection to the client is over."""


@dataclass
class Server:
    upstream: int
    delay_s: float = 0.0
    rate: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    free_at: float = 0.0
    """When the limited line has passed all that was given to it."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(Broken, ConnectionError, asyncio.IncompleteReadError):
            while True:
                await self._exchange(reader, writer)
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        fields = fields_of(head)
        if path == ADMIN:
            return await self._admin(reader, writer, int(fields["content-length"]))
        request = Request(method, path, fields.get("range", ""))
        fault = self._fault_for(request)
        self.requests.append(request)
        if fault.kind == "reset_up":
            await reader.readexactly(min(int(fault.value), int(fields.get("content-length", 0))))
            reset(writer)
        if fields.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await read_body(reader, fields)
        await asyncio.sleep(self.delay_s + (fault.value if fault.kind == "slow" else 0))
        if fault.kind == "hang":
            await reader.read()  # until the client gives up
            raise Broken
        if fault.kind == "fail":
            answer = f"HTTP/1.1 {int(fault.value)} Fault\r\nContent-Length: {len(SLOW_DOWN)}\r\n\r\n".encode()
            writer.write(answer + (SLOW_DOWN if method != "HEAD" else b""))
            return await writer.drain()
        return await self._forward(head, body, method, fault, writer)

    def _fault_for(self, request: Request) -> Fault:
        for fault in self.faults:
            if fault.times and fault.method in ("", request.method) and fault.path in request.path:
                fault.times -= 1
                request.fault = fault.kind
                return fault
        return Fault("")

    async def _forward(self, head: bytes, body: bytes, method: str, fault: Fault, client: asyncio.StreamWriter) -> None:
        store, to_store = await asyncio.open_connection("127.0.0.1", self.upstream, limit=1 << 20)
        try:
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))]
            to_store.write(b"\r\n".join([lines[0], b"Connection: close", *lines[1:]]) + body)
            await to_store.drain()
            answer = await store.readuntil(b"\r\n\r\n")
            size = fields_of(answer).get("content-length")
            if fault.kind == "truncate" and size is not None:
                size = str(min(int(size), int(fault.value)))
            client.write(renewed(answer, size))
            if method != "HEAD":
                await self._pass_body(store, client, int(size) if size is not None else None, fault)
            await client.drain()
        finally:
            to_store.close()
        if size is None:  # the end of the connection is the end of the body
            raise Broken

    async def _pass_body(
        self, store: asyncio.StreamReader, client: asyncio.StreamWriter, size: int | None, fault: Fault
    ) -> None:
        passed = 0
        while size is None or passed < size:
            data = await store.read(CHUNK if size is None else min(CHUNK, size - passed))
            if fault.kind == "reset" and passed + len(data) >= fault.value:
                client.write(data[: int(fault.value) - passed])
                await client.drain()
                reset(client)
            if not data:
                return
            if fault.kind == "corrupt" and 0 <= fault.value - passed < len(data):
                at = int(fault.value) - passed
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            passed += len(data)
            await self._wait_for_line(len(data))
            client.write(data)
            await client.drain()

    async def _wait_for_line(self, count: int) -> None:
        if self.rate:
            now = asyncio.get_running_loop().time()
            self.free_at = max(self.free_at, now) + count / self.rate
            await asyncio.sleep(self.free_at - now)

    async def _admin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
        change = json.loads(await reader.readexactly(size))
        if change.pop("clear", False):
            self.delay_s = self.rate = 0.0
            self.faults, self.requests = [], []
        if fault := change.pop("fault", None):
            self.faults.append(Fault(**fault))
        for name, value in change.items():
            setattr(self, name, value)
        requests = [asdict(request) for request in self.requests]
        state = json.dumps({"delay_s": self.delay_s, "rate": self.rate, "requests": requests}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(state) + state)
        await writer.drain()


def fields_of(head: bytes) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in head.decode("latin-1").split("\r\n")[1:] if ":" in line)
    return {name.lower(): value.strip() for name, value in pairs}


def renewed(answer: bytes, size: str | None) -> bytes:
    """The head of an answer for our own connection to the client."""
    lines = [
        line
        for line in answer.rstrip(b"\r\n").split(b"\r\n")
        if not line.lower().startswith((b"connection:", b"content-length:"))
    ]
    lines.append(b"Connection: close" if size is None else b"Content-Length: " + size.encode())
    return b"\r\n".join(lines).replace(b"HTTP/1.0", b"HTTP/1.1", 1) + b"\r\n\r\n"


async def read_body(reader: asyncio.StreamReader, fields: dict[str, str]) -> bytes:
    """The request's body as it came, so that what its head says of it stays true."""
    if "chunked" not in fields.get("transfer-encoding", "").lower():
        return await reader.readexactly(int(fields.get("content-length", 0)))
    body = b""
    while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
        line = await reader.readuntil(b"\r\n")
        body += line + await reader.readexactly(int(line.split(b";")[0], 16) + 2)
    return body


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST and not with FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise Broken


async def main(upstream: int) -> None:
    server = await asyncio.start_server(Server(upstream).serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

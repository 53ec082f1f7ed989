"""The process of the fault proxy: HTTP/1.1, one request of a connection after the other."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from support.fault_proxy import ADMIN, Fault, Request

CHUNK = 1 << 17
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, says the proxy.</Message></Error>"
CODES = {403: "AccessDenied", 404: "NoSuchBucket", 500: "InternalError", 503: "SlowDown", 507: "InsufficientStorage"}
LISTS = ("list-type=", "comp=list", "delimiter=")
"""What the path of a request for a list has."""


class Broken(Exception):
    """The connection to the client is over."""


@dataclass
class Server:
    upstream: int
    delay_s: float = 0.0
    rate: float = 0.0
    rate_up: float = 0.0
    black_hole: bool = False
    swallowed: int = 0
    strip: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    lists: dict[str, bytes] = field(default_factory=dict)
    """The last answer to each request for a list."""
    free_at: float = 0.0
    """When the limited line down has passed all that was given to it."""
    free_up_at: float = 0.0

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
        if self.black_hole:
            self.swallowed += 1
            await asyncio.Event().wait()
        request = Request(method, path, fields.get("range", ""))
        fault = self._fault_for(request)
        self.requests.append(request)
        if fields.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.kind == "reset_up":
            await reader.readexactly(min(int(fault.value), int(fields.get("content-length", 0))))
            reset(writer)
        body = await read_body(reader, fields, self._wait_for_line_up)
        await asyncio.sleep(self.delay_s + (fault.value if fault.kind == "slow" else 0))
        if fault.kind == "hang":
            await reader.read()  # until the client gives up
            raise Broken
        if fault.kind == "fail":
            writer.write(failure(int(fault.value), method))
            return await writer.drain()
        if fault.kind == "stale" and path in self.lists:
            writer.write(self.lists[path])
            return await writer.drain()
        return await self._forward(head, body, request, fault, writer)

    def _fault_for(self, request: Request) -> Fault:
        for fault in self.faults:
            if fault.times and fault.method in ("", request.method) and fault.path in request.path:
                fault.times -= 1
                request.fault = fault.kind
                return fault
        return Fault("")

    async def _forward(
        self, head: bytes, body: bytes, request: Request, fault: Fault, client: asyncio.StreamWriter
    ) -> None:
        store, to_store = await asyncio.open_connection("127.0.0.1", self.upstream, limit=1 << 20)
        try:
            left_out = ("connection:", "expect:", *([f"{self.strip.lower()}:"] if self.strip else []))
            lines = [line for line in head.split(b"\r\n") if not line.decode("latin-1").lower().startswith(left_out)]
            to_store.write(b"\r\n".join([lines[0], b"Connection: close", *lines[1:]]) + body)
            await to_store.drain()
            answer = await store.readuntil(b"\r\n\r\n")
            if fault.kind == "lose":
                reset(client)
            size = fields_of(answer).get("content-length")
            if fault.kind == "truncate" and size is not None:
                size = str(min(int(size), int(fault.value)))
            client.write(renewed(answer, size))
            passed = bytearray()
            if request.method != "HEAD":
                await self._pass_body(store, client, int(size) if size is not None else None, fault, passed)
            await client.drain()
            if request.method == "GET" and size is not None and any(word in request.path for word in LISTS):
                self.lists[request.path] = renewed(answer, size) + bytes(passed)
        finally:
            to_store.close()
        if size is None:  # the end of the connection is the end of the body
            raise Broken

    async def _pass_body(
        self, store: asyncio.StreamReader, client: asyncio.StreamWriter, size: int | None, fault: Fault, kept: bytearray
    ) -> None:
        """Pass on the body of an answer; a copy of a short one is `kept`."""
        passed = 0
        while size is None or passed < size:
            data = await store.read(CHUNK if size is None else min(CHUNK, size - passed))
            if passed < CHUNK * 8:
                kept += data
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

    async def _wait_for_line_up(self, count: int) -> None:
        if self.rate_up:
            now = asyncio.get_running_loop().time()
            self.free_up_at = max(self.free_up_at, now) + count / self.rate_up
            await asyncio.sleep(self.free_up_at - now)

    async def _admin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
        change = json.loads(await reader.readexactly(size))
        if change.pop("clear", False):
            self.delay_s = self.rate = self.rate_up = 0.0
            self.black_hole, self.swallowed, self.strip = False, 0, ""
            self.faults, self.requests, self.lists = [], [], {}
        if fault := change.pop("fault", None):
            self.faults.append(Fault(**fault))
        for name, value in change.items():
            setattr(self, name, value)
        names = ("delay_s", "rate", "rate_up", "black_hole", "swallowed", "strip")
        settings = {name: getattr(self, name) for name in names}
        state = json.dumps({**settings, "requests": [asdict(request) for request in self.requests]}).encode()
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


def failure(status: int, method: str) -> bytes:
    body = ERROR.format(code=CODES.get(status, "Fault")).encode()
    head = f"HTTP/1.1 {status} Fault\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head if method == "HEAD" else head + body


async def read_body(
    reader: asyncio.StreamReader, fields: dict[str, str], wait: Callable[[int], Awaitable[None]]
) -> bytes:
    """The request's body as it came, so that what its head says of it stays true; `wait` sets the pace."""
    body = bytearray()
    if "chunked" not in fields.get("transfer-encoding", "").lower():
        size = int(fields.get("content-length", 0))
        while len(body) < size:
            count = min(CHUNK, size - len(body))
            body += await reader.readexactly(count)
            await wait(count)
        return bytes(body)
    while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
        line = await reader.readuntil(b"\r\n")
        count = int(line.split(b";")[0], 16) + 2
        body += line + await reader.readexactly(count)
        await wait(count)
    return bytes(body)


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

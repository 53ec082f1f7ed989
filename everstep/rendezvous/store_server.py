"""Key-value store of one start, hosted by the first node's agent; torch-free.

Only processes that know the start's key are served (`channel`). On one machine the server listens on a UNIX socket in a
folder of this user, on several nodes on the one address that the nodes use. Connections without a proof of the key are
limited in number and time, so a flood of them exhausts neither descriptors nor memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable

from everstep.rendezvous import channel
from everstep.rendezvous.channel import ChannelError, Fields

MOST_UNPROVEN = 128
"""Connections without a proof at a time; one more closes the oldest of them."""
BACKLOG, AT_A_TIME = 4096, 32
"""Connections that the kernel queues, and those that are accepted in a row before any is served."""


class StoreServer:
    """A store in a thread of this process; `address` is where clients find it."""

    def __init__(self, address: str, key: bytes) -> None:
        self.address = address
        self._key = key
        self._contents = Contents()
        self._unproven: OrderedDict[asyncio.StreamWriter, None] = OrderedDict()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(self._listen())
        self._thread = threading.Thread(target=self._loop.run_forever, name="everstep-store", daemon=True)
        self._thread.start()

    async def _listen(self) -> asyncio.AbstractServer:
        listener, self.address = _listener(self.address)
        accepts = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
        # asyncio accepts as many connections in a row as its backlog says, before it serves any of them.
        server = await accepts(self._serve, sock=listener, backlog=AT_A_TIME)
        listener.listen(BACKLOG)
        return server

    def close(self) -> None:
        """Stop listening and serving."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            self._thread.join(timeout=5)
            self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._loop.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Including the cancellation by `close`, which asyncio's streams would log as an error.
        ended = (ChannelError, OSError, EOFError, asyncio.CancelledError, ValueError)
        with contextlib.suppress(*ended), contextlib.closing(writer):
            self._admit(writer)
            try:
                receive, send = await asyncio.wait_for(self._prove(reader, writer), channel.PROOF_S)
            finally:
                self._unproven.pop(writer, None)
            while True:
                length, tag = channel.head(await reader.readexactly(channel.HEAD.size))
                answer = await self._contents.answer(receive.unpack(tag, await reader.readexactly(length)))
                writer.write(send.pack(answer))
                await writer.drain()

    def _admit(self, writer: asyncio.StreamWriter) -> None:
        self._unproven[writer] = None
        if len(self._unproven) > MOST_UNPROVEN:
            oldest, _ = self._unproven.popitem(last=False)
            oldest.transport.abort()

    async def _prove(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[channel.Direction, channel.Direction]:
        challenged = channel.challenge()
        writer.write(challenged)
        answered = await reader.readexactly(channel.ANSWER_BYTES)
        writer.write(channel.accept(self._key, challenged, answered))
        return channel.directions(self._key, challenged, answered)


def _listener(address: str) -> tuple[socket.socket, str]:
    """Return a bound socket, and its address with the port that it has."""
    kind, _, place = address.partition(":")
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        with channel.short_path(place) as short:
            listener.bind(short)
        return listener, address
    host, _, port = place.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host.strip("[]"), int(port)))
    return listener, f"tcp:{host}:{listener.getsockname()[1]}"


class Contents:
    """Keys and values of the store, and the requests that read and change them."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._waiting: defaultdict[bytes, set[asyncio.Future[None]]] = defaultdict(set)
        self._requests: dict[bytes, Callable[..., Fields | Awaitable[Fields]]] = {
            b"set": self._set,
            b"get": self._get,
            b"wait": self._wait,
            b"check": lambda *keys: [b"1" if all(key in self._values for key in keys) else b""],
            b"add": self._add,
            b"delete": lambda key: [b"" if self._values.pop(key, None) is None else b"1"],
            b"compare": self._compare,
            b"append": lambda key, value: self._set(key, self._values.get(key, b"") + value),
            b"count": lambda: [str(len(self._values)).encode()],
        }

    async def answer(self, request: Fields) -> Fields:
        """Return the fields of the answer: `ok`, `late` or `wrong`, and values."""
        try:
            found = self._requests[request[0]](*request[1:])
            return [b"ok", *(found if isinstance(found, list) else await found)]
        except TimeoutError:
            return [b"late"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            return [b"wrong", repr(error).encode()]

    def _set(self, *pairs: bytes) -> Fields:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self._values[key] = value
            for future in self._waiting.pop(key, ()):
                if not future.done():
                    future.set_result(None)
        return []

    async def _get(self, seconds: bytes, *keys: bytes) -> Fields:
        await self._wait(seconds, *keys)
        return [self._values.get(key, b"") for key in keys]

    async def _wait(self, seconds: bytes, *keys: bytes) -> Fields:
        async with asyncio.timeout(float(seconds)):
            for key in keys:
                while key not in self._values:
                    future = asyncio.get_running_loop().create_future()
                    self._waiting[key].add(future)
                    try:
                        await future
                    finally:
                        self._forget(key, future)
        return []

    def _forget(self, key: bytes, future: asyncio.Future[None]) -> None:
        if key in self._waiting:
            self._waiting[key].discard(future)
            if not self._waiting[key]:
                del self._waiting[key]

    def _add(self, key: bytes, amount: bytes) -> Fields:
        total = str(int(self._values.get(key, b"0")) + int(amount)).encode()
        self._set(key, total)
        return [total]

    def _compare(self, key: bytes, expected: bytes, desired: bytes) -> Fields:
        present = self._values.get(key)
        if present == expected or (present is None and not expected):
            self._set(key, desired)
            return [desired]
        return [expected if present is None else present]

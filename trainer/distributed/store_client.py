"""Client of a start's store, with the interface of `torch.distributed.Store`."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from everstep.errors import MachineError
from everstep.trainer.distributed import channel
from everstep.trainer.distributed.channel import ChannelError, Fields, short_path

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5
"""Seconds between two attempts to reach a server that does not answer yet."""
SLACK_S = 30.0
"""Seconds to wait for an answer, beyond the time for which the server waits for a key."""

_kept: list[RunStore] = []
"""All clients: torch keeps only their C++ half, which fails once the Python half is collected."""


class RunStore(Store):
    """One connection to the store; threads take turns on it, so `clone` opens another one."""

    def __init__(self, address: str, key: bytes, timeout_s: float) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout_s))
        self._address = address
        self._key = key
        self._lock = threading.Lock()
        self._socket, self._send, self._receive = _connect(address, key, timeout_s)
        _kept.append(self)

    def _ask(self, *fields: bytes, wait_s: float = 0.0) -> Fields:
        with self._lock:
            try:
                self._socket.settimeout(wait_s + SLACK_S)
                self._socket.sendall(self._send.pack(fields))
                length, tag = channel.head(_read(self._socket, channel.HEAD.size))
                status, *values = self._receive.unpack(tag, _read(self._socket, length))
            except (OSError, ChannelError) as error:
                self._socket.close()  # the number of the next message may differ between the two ends
                raise dist.DistNetworkError(f"the store of this start is gone: {error}") from error
        if status == b"late":
            raise dist.DistStoreError(f"no value after {wait_s:.0f} s for {_words(fields[2:])}")
        if status != b"ok":
            raise ValueError(f"store: {_words(fields[:2])}: {_words(values)}")
        return values

    def _seconds(self, timeout: timedelta | None = None) -> float:
        given: timedelta = self.timeout if timeout is None else timeout  # type: ignore[attr-defined]  # missing in stubs
        return given.total_seconds()

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(b"set", key.encode(), _bytes(value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        wait_s = self._seconds()
        return self._ask(b"get", str(wait_s).encode(), *(key.encode() for key in keys), wait_s=wait_s)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        pairs = zip(keys, values, strict=True)
        self._ask(b"set", *(part for key, value in pairs for part in (key.encode(), _bytes(value))))

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(b"add", key.encode(), str(amount).encode())[0])

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask(b"check", *(key.encode() for key in keys))[0])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        wait_s = self._seconds(timeout)
        self._ask(b"wait", str(wait_s).encode(), *(key.encode() for key in keys), wait_s=wait_s)

    def delete_key(self, key: str) -> bool:
        return bool(self._ask(b"delete", key.encode())[0])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._ask(b"compare", key.encode(), _bytes(expected), _bytes(desired))[0]

    def append(self, key: str, value: str | bytes) -> None:
        self._ask(b"append", key.encode(), _bytes(value))

    def num_keys(self) -> int:
        return int(self._ask(b"count")[0])

    # torch's C++ half calls these two by other names than Python does.
    deleteKey, getNumKeys = delete_key, num_keys

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> RunStore:
        return RunStore(self._address, self._key, self._seconds())


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _words(fields: Sequence[bytes]) -> str:
    return ", ".join(field.decode(errors="replace") for field in fields)


def _connect(address: str, key: bytes, timeout_s: float) -> tuple[socket.socket, channel.Direction, channel.Direction]:
    """Connect, and let both ends prove the key; retry until a server answers.

    Raises:
        MachineError: no server has answered in time, or none that knows the key.
    """
    deadline, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
    while True:
        connection: socket.socket | None = None
        try:
            connection = _open(address)
            connection.settimeout(channel.PROOF_S)
            return connection, *_prove(connection, key)
        except (OSError, ChannelError) as error:
            if connection is not None:
                connection.close()
            if time.monotonic() + pause_s > deadline:
                raise MachineError(f"the store of this start at {address} cannot be used: {error}") from error
        time.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)


def _open(address: str) -> socket.socket:
    kind, _, place = address.partition(":")
    if kind == "unix":
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.ExitStack() as failed:
            failed.callback(connection.close)
            with short_path(place) as short:
                connection.connect(short)
            failed.pop_all()
        return connection
    host, _, port = place.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout=channel.PROOF_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _prove(connection: socket.socket, key: bytes) -> tuple[channel.Direction, channel.Direction]:
    challenged = _read(connection, channel.CHALLENGE_BYTES)
    answered = channel.answer(key, challenged)
    connection.sendall(answered)
    channel.confirm(key, challenged, answered, _read(connection, channel.PROOF_BYTES))
    return channel.directions(key, challenged, answered)


def _read(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionError("the other end has closed the connection")
        data += piece
    return bytes(data)

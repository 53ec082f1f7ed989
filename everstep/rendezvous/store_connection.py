"""Connection to a start's store; torch-free."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from everstep.errors import MachineError
from everstep.rendezvous import channel
from everstep.rendezvous.channel import ChannelError, Fields, short_path

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.5
"""Seconds between two attempts to reach a server that does not answer yet."""
SLACK_S = 30.0
"""Seconds to wait for an answer, beyond the time for which the server waits for a key."""


class StoreGoneError(ConnectionError):
    """The server or the connection to it has ended."""


class StoreConnection:
    """One connection to the store at `address`; threads take turns on it."""

    def __init__(self, address: str, key: bytes, timeout_s: float) -> None:
        self._lock = threading.Lock()
        self._socket, self._send, self._receive = _connect(address, key, timeout_s)

    def ask(self, *fields: bytes, wait_s: float = 0.0) -> Fields:
        """Send one request; return the values of the answer.

        Args:
            wait_s: seconds that the server may wait for a key.

        Raises:
            StoreGoneError: the store cannot be reached any more.
            TimeoutError: a key was not set within `wait_s`.
            ValueError: the server does not know the request.
        """
        with self._lock:
            try:
                self._socket.settimeout(wait_s + SLACK_S)
                self._socket.sendall(self._send.pack(fields))
                length, tag = channel.head(_read(self._socket, channel.HEAD.size))
                status, *values = self._receive.unpack(tag, _read(self._socket, length))
            except (OSError, ChannelError) as error:
                self._socket.close()  # the number of the next message may differ between the two ends
                raise StoreGoneError(f"the store of this start is gone: {error}") from error
        if status == b"late":
            raise TimeoutError(f"no value after {wait_s:.0f} s for {_words(fields[2:])}")
        if status != b"ok":
            raise ValueError(f"store: {_words(fields[:2])}: {_words(values)}")
        return values

    def close(self) -> None:
        self._socket.close()


def _words(fields: Fields | tuple[bytes, ...]) -> str:
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

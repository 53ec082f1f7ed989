"""Authenticated messages over a stream; torch-free, and nothing that arrives is unpickled.

Both ends know a key. A challenge each way proves it, and both ends derive a key for each direction from the challenges.
Every later message has a MAC over its number and content, so a third party can neither join, nor insert, repeat or
change one. Messages are not encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELLO = b"everstep-store-1"
NONCE_BYTES, PROOF_BYTES, TAG_BYTES = 32, 32, 16
CHALLENGE_BYTES = len(HELLO) + NONCE_BYTES
ANSWER_BYTES = NONCE_BYTES + PROOF_BYTES
PROOF_S = 10.0
"""Seconds for the proof."""
LARGEST_BYTES = 1 << 28
"""Limit of a message. Memory for it is allocated only after both ends have proved the key."""
LONGEST_PATH = 100
"""Bytes of a socket's path; the kernel takes 108 with its end."""
HEAD = struct.Struct("<I16s")
LENGTH = struct.Struct("<I")

Fields = list[bytes]


class ChannelError(Exception):
    """A peer that does not know the key, or a message that was changed on its way."""


def _digest(key: bytes, *words: bytes) -> bytes:
    return hmac.digest(key, b"\0".join(words), hashlib.sha256)


def challenge() -> bytes:
    """Return the server's challenge, which begins a connection."""
    return HELLO + secrets.token_bytes(NONCE_BYTES)


def answer(key: bytes, challenged: bytes) -> bytes:
    """Return the client's answer: a nonce of its own, and the proof that it knows the key.

    Raises:
        ChannelError: the bytes are no challenge of this protocol.
    """
    if not challenged.startswith(HELLO) or len(challenged) != CHALLENGE_BYTES:
        raise ChannelError("no store of this version answers there")
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + _digest(key, b"client", challenged, nonce)


def accept(key: bytes, challenged: bytes, answered: bytes) -> bytes:
    """Check the client's answer; return the server's proof that it knows the key.

    Raises:
        ChannelError: the client does not know the key.
    """
    nonce, proof = answered[:NONCE_BYTES], answered[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _digest(key, b"client", challenged, nonce)):
        raise ChannelError("the other end does not know the key of this start")
    return _digest(key, b"server", challenged, nonce)


def confirm(key: bytes, challenged: bytes, answered: bytes, proof: bytes) -> None:
    """Raise ChannelError unless the server knows the key too."""
    if not hmac.compare_digest(proof, _digest(key, b"server", challenged, answered[:NONCE_BYTES])):
        raise ChannelError("the store does not know the key of this start")


@dataclass
class Direction:
    """Messages of one direction of one connection."""

    key: bytes
    number: int = 0

    def _tag(self, body: bytes) -> bytes:
        self.number += 1
        return _digest(self.key, str(self.number).encode(), body)[:TAG_BYTES]

    def pack(self, fields: Sequence[bytes]) -> bytes:
        body = b"".join(part for field in fields for part in (LENGTH.pack(len(field)), field))
        return HEAD.pack(len(body), self._tag(body)) + body

    def unpack(self, tag: bytes, body: bytes) -> Fields:
        """Return the fields of a message; ChannelError unless it is the next one that the other end sent."""
        if not hmac.compare_digest(tag, self._tag(body)):
            raise ChannelError("a message was changed on its way")
        fields, at = [], 0
        while at < len(body):
            (length,) = LENGTH.unpack_from(body, at)
            at += LENGTH.size
            fields.append(body[at : at + length])
            at += length
        return fields


def head(data: bytes) -> tuple[int, bytes]:
    """Return length and tag of the message that follows."""
    length, tag = HEAD.unpack(data)
    if length > LARGEST_BYTES:
        raise ChannelError(f"a message of {length} bytes (at most {LARGEST_BYTES})")
    return length, tag


def directions(key: bytes, challenged: bytes, answered: bytes) -> tuple[Direction, Direction]:
    """Return the directions (client to server, server to client) of one connection."""
    return (
        Direction(_digest(key, b"to server", challenged, answered)),
        Direction(_digest(key, b"to client", challenged, answered)),
    )


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """Yield a path to the same socket that is short enough for a socket's address."""
    if len(path.encode()) < LONGEST_PATH:
        yield path
        return
    folder = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{Path(path).name}"
    finally:
        os.close(folder)

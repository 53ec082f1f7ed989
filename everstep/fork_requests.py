"""Messages between the launcher and the fork server of its node.

Each is a JSON object in one packet of a UNIX socket (SOCK_SEQPACKET):

    {"environment": {NAME: VALUE or null}}   launcher: fork a rank with these changes; its output may be attached
    {"ready": WHY}                           server: ready; a text says why no process must be forked from it
    {"forked": PID}                          server: a process has been forked for the oldest open request; its pidfd
                                             is attached where the kernel has them
    {"ended": PID, "code": CODE}             server: it has ended; a negative code is the signal that killed it
"""

from __future__ import annotations

import json
import socket
from typing import Any

Message = dict[str, Any]
LARGEST_BYTES = 1 << 17
"""Limit of a message: the kernel's buffer takes a little more."""


def connected_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(control: socket.socket, message: Message, attached: int | None = None) -> None:
    """Send a message, with the file descriptor `attached` if there is one.

    Raises:
        OSError: the other end is gone.
    """
    packed = json.dumps(message).encode()
    socket.send_fds(control, [packed], [] if attached is None else [attached])


def receive(control: socket.socket) -> tuple[Message | None, int | None]:
    """Return the next message and the attached file descriptor; no message if the other end is gone."""
    try:
        packed, attached, _, _ = socket.recv_fds(control, LARGEST_BYTES, 1)
    except ConnectionResetError:
        return None, None
    return json.loads(packed) if packed else None, attached[0] if attached else None

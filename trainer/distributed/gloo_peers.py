"""Proofs for the connections of gloo, which has no authentication of its own.

Each gloo group listens on a port of its own for as long as it exists. gloo takes the first connection that names the
number of a peer for that peer, and a rank that has no descriptors left ends. So the ports of a group are closed once
its ranks are connected; then each pair of ranks proves over its connection that both know a secret of this start.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from everstep.errors import MachineError

PROOF_S = 60.0
"""Seconds to wait for the proof of a peer, which is connected already."""
PROOF_BYTES = 32


def shared_secret(store: Store, rank: int) -> bytes:
    """Return the secret that rank 0 has put into the store, which serves only the ranks of this start."""
    if rank == 0:
        store.set("peers", secrets.token_hex(PROOF_BYTES))
    return bytes.fromhex(store.get("peers").decode())


@contextlib.contextmanager
def closed_afterwards() -> Iterator[None]:
    """Close the ports of all gloo groups that this block makes."""
    before = _listening()
    yield
    for descriptor in _listening() - before:
        _close_port(descriptor)


def _listening() -> set[int]:
    """Return the descriptors of this process that listen on an internet port."""
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as each:
            listens = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and each.family in (socket.AF_INET, socket.AF_INET6):
                found.add(int(name))
    return found


def _close_port(descriptor: int) -> None:
    """Replace the listener of the descriptor by one that no process can reach.

    gloo's thread may be about to accept from it, and ends the process for any error but EAGAIN.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as unreachable:
        unreachable.bind(f"{folder}/s")
        unreachable.setblocking(False)
        unreachable.listen(1)
        os.dup2(unreachable.fileno(), descriptor, inheritable=False)


def prove(group: dist.ProcessGroup, secret: bytes) -> None:
    """Exchange proofs with every other rank of the group, each over its own connection.

    Raises:
        MachineError: a peer does not know the secret.
    """
    me, name = dist.get_rank(), group.group_name
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != me]
    arrived = {rank: torch.empty(PROOF_BYTES, dtype=torch.uint8) for rank in others}
    pending = [dist.irecv(arrived[rank], rank, group) for rank in others]
    pending += [dist.isend(_proof(secret, name, me, rank), rank, group) for rank in others]
    for work in pending:
        if work is not None:
            work.wait(timedelta(seconds=PROOF_S))
    for rank in others:
        if not hmac.compare_digest(bytes(arrived[rank].tolist()), bytes(_proof(secret, name, rank, me).tolist())):
            raise MachineError(f"rank {me}: the connection of rank {rank} does not know the secret of this start")


def _proof(secret: bytes, name: str, sender: int, receiver: int) -> torch.Tensor:
    digest = hmac.digest(secret, f"{name} {sender} {receiver}".encode(), hashlib.sha256)
    return torch.tensor(list(digest), dtype=torch.uint8)

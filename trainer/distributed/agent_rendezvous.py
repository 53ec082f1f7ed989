"""Rendezvous of the agents of one job start, whose nodes the launcher has fixed.

torch's own rendezvous unpickles a state that any process that reaches its port can write. Here the first node's agent
hosts the start's own store (`store_server`), for agents and ranks alike. On one machine that is a UNIX socket in a
folder of this user; nothing listens on the network.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from everstep.security.job_secrets import START_KEY, STORE
from everstep.security.ownership import other_reader
from everstep.trainer.distributed.store_client import RunStore
from everstep.trainer.distributed.store_server import StoreServer

BACKEND = "everstep"
"""Name of this rendezvous on torchrun's command line."""
HERE = "here"
"""Endpoint of a start on one machine."""
FOLDERS = "everstep-start-"
SOCKET, LOCK = "store", "lock"
UNLOCKED_S = 3600.0
"""Age at which a folder without a lock is left over, not one that is being made."""
JOIN_S = 600.0
"""Seconds to wait for the store, unless `--rdzv-conf` has join_timeout."""
LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"


def register() -> None:
    """Make this rendezvous known to torchrun in this process."""
    rendezvous_handler_registry.register(BACKEND, FixedNodes)


class FixedNodes(RendezvousHandler):
    """Rendezvous of a fixed number of nodes, each of which knows its rank."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.nodes = parameters.max_nodes
        self.rank = int(parameters.get("rank", 0))
        self.endpoint = parameters.endpoint
        self.id = parameters.run_id
        self.join_s = float(parameters.get("join_timeout", JOIN_S))
        self.for_script: bool = parameters.get("program", "") == "script"
        self._server: StoreServer | None = None
        self._torch_store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        # On several nodes the launcher has derived the key from the job's token; on one, no other process needs it.
        key = secrets.token_hex(32) if self.endpoint == HERE else os.environ[START_KEY]
        address = self._host(bytes.fromhex(key))
        store = PrefixStore("agents", RunStore(address, bytes.fromhex(key), self.join_s))
        bootstrap = self._bootstrap(store)
        if self.for_script:
            os.environ.pop(START_KEY, None)
        else:
            os.environ |= {STORE: address, START_KEY: key}
        return RendezvousInfo(store, self.rank, self.nodes, bootstrap)

    def _host(self, key: bytes) -> str:
        """Return the store's address; the first node's agent hosts it."""
        if self.endpoint == HERE:
            _stay_on_this_machine()
            address = f"unix:{start_folder()}/{SOCKET}"
        else:
            address = f"tcp:{self.endpoint}"
        if self.rank == 0:
            self._server = StoreServer(address, key)
            atexit.register(self._server.close)
        return address

    def _bootstrap(self, store: Store) -> RendezvousStoreInfo:
        """Return MASTER_ADDR and MASTER_PORT for programs that are not our trainer.

        They expect torch's own store, which any process that reaches it can read and write. So it listens on the
        node's own address or the loopback, and our trainer has none.
        """
        host = "127.0.0.1" if self.endpoint == HERE else self.endpoint.rpartition(":")[0].strip("[]")
        if not self.for_script:
            return RendezvousStoreInfo(host, 0)
        if self.rank == 0:
            self._torch_store = _torch_store(host, self.join_s)
            store.set("torch/port", str(self._torch_store.port))
        return RendezvousStoreInfo(host, int(store.get("torch/port")))

    @property
    def use_agent_store(self) -> bool:
        return self.for_script

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self.id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: no node joins after the start."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def _torch_store(host: str, timeout_s: float) -> TCPStore:
    """Host torch's store on one address; by itself it would listen on all of them."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=4096)
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )


def _stay_on_this_machine() -> None:
    """Set the interface of the ranks' own connections to the loopback, unless the user has chosen one."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, LOOPBACK)


def start_folder() -> str:
    """Make a folder that only this user can enter, and remove those of processes that were killed.

    It is removed at exit. This process holds a lock on a file in it, which the kernel releases even after a kill.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDERS}*"):
        _remove_if_left(left)
    folder = tempfile.mkdtemp(prefix=FOLDERS)  # mode 0700
    atexit.register(shutil.rmtree, folder, True)
    lock = os.open(f"{folder}/{LOCK}.new", os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(f"{folder}/{LOCK}.new", f"{folder}/{LOCK}")  # a file of this name is locked as long as its process lives
    return folder


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user that no process holds any more."""
    with contextlib.suppress(OSError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or other_reader(found):
            return
        if not (folder / LOCK).exists():
            if time.time() - found.st_mtime > UNLOCKED_S:  # its owner was killed before it could lock it
                shutil.rmtree(folder, ignore_errors=True)
            return
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)

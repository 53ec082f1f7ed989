"""Starts of the ranks of this machine: forked if possible, else by torchrun or as a new process."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from everstep.launch.console import say
from everstep.launch.job_start.child import has_terminal
from everstep.launch.job_start.fork_server import ForkServer
from everstep.launch.job_start.local_start import Local
from everstep.launch.job_start.other_nodes import OtherNodes
from everstep.launch.job_start.rank_group import RankGroup, rank_environments
from everstep.launch.torchrun import JOIN_NODES_S, Rendezvous
from everstep.security.job_secrets import START_KEY, STORE

Shared = tuple[dict[str, str], OtherNodes | None]
ALONE = Rendezvous()


@dataclass
class RankStarter:
    """Ranks of one machine, start after start.

    The fork server stays between the starts, so a restart imports nothing.
    """

    local: Local
    program: Sequence[str]
    """-m, a module and the ranks' arguments."""
    env: Mapping[str, str]
    nproc: int
    warm: bool
    """False: no fork server."""
    server: ForkServer | None = field(default=None, repr=False)
    """Kept from earlier starts, and for later ones."""

    reads: bool = False
    """True if one of the ranks may read from the terminal."""

    def __post_init__(self) -> None:
        self.warm = self.warm and sys.platform == "linux"

    def __enter__(self) -> RankStarter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.close()

    def prepare(self) -> None:
        """Start the fork server before it is needed."""
        if self.warm:
            self._running_server()

    def run(
        self, cold: Sequence[str], output: int | None = None, meeting: Rendezvous = ALONE, key: str | None = None
    ) -> int:
        """Run this machine's part of one start; return its exit code.

        Args:
            cold: argv with which the ranks are started without a fork server.
            output: a file descriptor for all output; None is the caller's own.
            meeting: the nodes of the start.
            key: of the start, in hexadecimal digits, where it has several nodes.

        Raises:
            LeftAtOnce: the user has asked a second time to stop.
        """
        if self.warm:
            server = self._running_server()
            code = self._run_forked(server, output, meeting, key)
            if not server.unfit or self.local.stopped is not None:
                return code
            say(f"ranks are started as new processes, not forked: {server.unfit}")
            self.warm = False
        return self.local.run(cold, self.env, output)

    def _running_server(self) -> ForkServer:
        if self.server is None or self.server.gone:
            # The key of a start is good for its ranks only, and these get it one by one.
            env = {name: value for name, value in self.env.items() if name != START_KEY}
            self.server = ForkServer(self.program, env, reads=self.reads and has_terminal())
        return self.server

    def _run_forked(self, server: ForkServer, output: int | None, meeting: Rendezvous, key: str | None) -> int:
        changed = _difference(server.env, self.env)
        if meeting.nodes == 1 and self.nproc == 1:
            return self.local.run_child(
                lambda more: RankGroup(server, [{**changed, **more}], output, self.local.grace_s)
            )
        shared = _store_here(self.env) if meeting.nodes == 1 else _store_of_nodes(meeting, str(key))
        with shared as (added, others):
            places = rank_environments(self.nproc, meeting.rank, meeting.nodes)
            ranks = [{**changed, **place, **added} for place in places]
            return self.local.run_child(
                lambda more: RankGroup(server, [{**rank, **more} for rank in ranks], output, self.local.grace_s, others)
            )


@contextlib.contextmanager
def _store_here(env: Mapping[str, str]) -> Iterator[Shared]:
    """Host the store of a start on this machine; yield the variables by which its ranks find it."""
    # Imported here: asyncio takes its time, in which the fork server is importing as well.
    from everstep.rendezvous.interface import stay_on_this_machine
    from everstep.rendezvous.start_folder import StartFolder
    from everstep.rendezvous.store_server import StoreServer

    key = secrets.token_hex(32)
    folder = StartFolder()
    server = StoreServer(folder.store, bytes.fromhex(key))
    interfaces = dict(env)
    stay_on_this_machine(interfaces)
    added = {name: value for name, value in interfaces.items() if name not in env}
    try:
        yield {**added, **_variables(server.address, key, "127.0.0.1")}, None
    finally:
        server.close()
        folder.close()


@contextlib.contextmanager
def _store_of_nodes(meeting: Rendezvous, key: str) -> Iterator[Shared]:
    """Host the store on the first node of a start; yield the variables to find it, and the other nodes."""
    from everstep.rendezvous.store_server import StoreServer

    address, secret = f"tcp:{meeting.endpoint}", bytes.fromhex(key)
    server = StoreServer(address, secret) if meeting.rank == 0 else None
    others = OtherNodes(address, secret, meeting.rank, meeting.nodes, JOIN_NODES_S)
    try:
        yield _variables(address, key, meeting.endpoint.rpartition(":")[0].strip("[]")), others
    finally:
        others.leave()
        if server is not None:
            server.close()


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str | None]:
    """Return the variables of this start that differ from those of the fork server; None: not set."""
    removed: dict[str, str | None] = dict.fromkeys(before.keys() - now.keys())
    return removed | {name: value for name, value in now.items() if before.get(name) != value and name != START_KEY}


def _variables(address: str, key: str, host: str) -> dict[str, str]:
    """Return the variables by which ranks find the store; there is no store of torch's own."""
    return {STORE: address, START_KEY: key, "MASTER_ADDR": host, "MASTER_PORT": "0"}

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
from everstep.launch.job_start.process import Local
from everstep.launch.job_start.rank_group import RankGroup, rank_environments
from everstep.security.job_secrets import START_KEY, STORE


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
    _server: ForkServer | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.warm = self.warm and sys.platform == "linux"

    def __enter__(self) -> RankStarter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()

    def run(self, cold: Sequence[str], output: int | None = None) -> int:
        """Run one start on this machine alone; return its exit code.

        Args:
            cold: argv with which the ranks are started without a fork server.
            output: a file descriptor for all output; None is the caller's own.

        Raises:
            LeftAtOnce: the user has asked a second time to stop.
        """
        if self.warm:
            server = self._ready_server()
            code = self._run_forked(server, output)
            if not server.unfit or self.local.stopped is not None:
                return code
            say(f"ranks are started as new processes, not forked: {server.unfit}")
            self.warm = False
        return self.local.run(cold, self.env, output)

    def _ready_server(self) -> ForkServer:
        if self._server is None or self._server.gone:
            self._server = ForkServer(self.program, self.env, reads=self.nproc == 1 and has_terminal())
        return self._server

    def _run_forked(self, server: ForkServer, output: int | None) -> int:
        if self.nproc == 1:
            return self.local.run_child(lambda more: RankGroup(server, [more], output, self.local.grace_s))
        with _store_here(self.env) as shared:
            ranks = [{**rank, **shared} for rank in rank_environments(self.nproc)]
            return self.local.run_child(
                lambda more: RankGroup(server, [{**rank, **more} for rank in ranks], output, self.local.grace_s)
            )


@contextlib.contextmanager
def _store_here(env: Mapping[str, str]) -> Iterator[dict[str, str]]:
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
        yield {**added, STORE: server.address, START_KEY: key, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    finally:
        server.close()
        folder.close()

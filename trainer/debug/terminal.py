"""pdb in a rank: after an error, and on one rank of several."""

from __future__ import annotations

import bdb
import sys
import time
from typing import TYPE_CHECKING

from everstep.config import DebugConfig
from everstep.errors import ConfigError
from everstep.fault import chain
from everstep.trainer.distributed.mesh import lost_peer

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from everstep.trainer.distributed.mesh import Mesh

OPEN = "debugger"
"""Key of the store that says that a rank is in its debugger."""
WAIT_S = 10.0
"""Seconds in which the rank with the terminal meets the error that another rank has met."""


def give_terminal(config: DebugConfig, rank: int, world: int) -> None:
    """Let `breakpoint()` open pdb on one rank of several, and do nothing on the others."""
    if config.rank is None or world == 1:
        return
    if config.rank >= world:
        raise ConfigError(f"debug.rank={config.rank}: there are {world} processes, so 0 to {world - 1}")
    sys.breakpointhook = sys.__breakpointhook__ if rank == config.rank else _ignore


def _ignore(*_: object, **__: object) -> None:
    """Stand in for pdb on the ranks without the terminal."""


def post_mortem(config: DebugConfig, error: BaseException, mesh: Mesh | None, rank: int, world: int) -> None:
    """Open pdb at the place of an error; a rank without the terminal waits for the one that has it."""
    left = any(isinstance(each, bdb.BdbQuit) for each in chain(error))
    if not config.post_mortem or left or not isinstance(error, Exception):
        return
    store = mesh.store if mesh is not None else None
    if world > 1 and rank != config.rank:
        _wait_for_debugger(store)
        return
    if lost_peer(error):
        print(f"debug.rank={rank} only lost another rank, whose error comes first; try debug.rank of that one")
        return
    import pdb
    import traceback

    if store is not None:
        store.set(OPEN, "1")
    traceback.print_exception(error)
    print(f"pdb on rank {rank}, where it was raised: p NAME, up, down, q", flush=True)
    pdb.post_mortem(error.__traceback__)


def _wait_for_debugger(store: Store | None) -> None:
    deadline = time.monotonic() + WAIT_S
    while store is not None and time.monotonic() < deadline:
        if store.check([OPEN]):
            time.sleep(1e6)  # the launcher ends this rank with the other
        time.sleep(0.2)

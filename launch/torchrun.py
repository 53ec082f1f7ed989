"""Command line and environment of a program under torchrun: pure functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RENDEZVOUS = "keep_alive_interval=5,keep_alive_max_attempt=120,last_call_timeout=3,join_timeout={join_s}"
"""Settings of the c10d rendezvous, in whole seconds.

An agent counts another as dead, and continues alone, when its last heartbeat is older than the product of the first two
by its own clock: so clocks may differ by ten minutes. A lost agent is noticed earlier, by its ranks or the scheduler.
"""
JOIN_S = 60
JOIN_NODES_S = 600
"""Longer for many nodes, which import torch from one file server and start minutes apart."""


@dataclass(frozen=True)
class Rendezvous:
    """Rendezvous of the agents of one job start; on a single machine, at a port that the store chooses."""

    nodes: int = 1
    endpoint: str = "127.0.0.1:0"
    """Address and port of the head node. Port 0 is a free one, so two jobs on one machine never collide."""
    address: str = "127.0.0.1"
    """Address of this node, as the others reach it."""
    is_head: bool | None = None
    """True if this node hosts the store; None: torchrun compares host names, and errs with aliases."""
    id: str = ""
    """Different for each start: processes left from an earlier one must not join."""


def trainer(url: str, plugins: Sequence[str] = (), config_digest: str = "") -> list[str]:
    """Return the trainer's arguments for `url`/config.yaml.

    The plug-in packages and the digest of the config are on the command line: write access to the folder is not enough
    to run code or to change the config of a start.
    """
    named = ["--plugins", ",".join(plugins)] if plugins else []
    digest = ["--config-digest", config_digest] if config_digest else []
    return ["-m", "everstep.trainer", "--frozen", url, *named, *digest]


def command(url: str, nproc: int, grace_s: int, plugins: Sequence[str] = (), config_digest: str = "") -> list[str]:
    """Return the argv to train on this machine alone; one process runs without torchrun, to start faster."""
    program = trainer(url, plugins, config_digest)
    if nproc == 1:
        return [sys.executable, *program]
    return agent(program, nproc, grace_s, Rendezvous(id=url.rsplit("/", 1)[-1]))


def agent(program: Sequence[str], nproc: int, grace_s: int, meeting: Rendezvous) -> list[str]:
    """Return the argv of this node's torchrun; `program` is a script, or -m and a module, with arguments."""
    return [
        sys.executable,
        "-m",
        "everstep.trainer.torchrun_agent",  # torchrun itself, less noisy when a worker fails
        f"--nnodes={meeting.nodes}",
        f"--nproc-per-node={nproc}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting.endpoint}",
        f"--rdzv-id={meeting.id}",
        f"--rdzv-conf={_settings(meeting)}",
        f"--local-addr={meeting.address}",
        "--monitor-interval=0.1",
        f"--shutdown-timeout={grace_s}",
        f"--log-dir={os.devnull}",  # otherwise it creates a folder for each start and never removes it
        "--max-restarts=0",  # the launcher restarts: torchrun would also restart a run that must not be
        *program,
    ]


def _settings(meeting: Rendezvous) -> str:
    settings = RENDEZVOUS.format(join_s=JOIN_S if meeting.nodes == 1 else JOIN_NODES_S)
    return settings if meeting.is_head is None else f"{settings},is_host={str(meeting.is_head).lower()}"


def environment(base: Mapping[str, str], threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the trainer's environment: the caller's, torchrun's settings and the job's additions."""
    return {
        **base,
        # torchrun keeps one store over restarts, from which gloo reads addresses of dead ranks: use a new one.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Always set: otherwise torchrun sets 1 and prints a paragraph.
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        # Its warnings about a lost peer are pages of stack frames; errors are still shown.
        "TORCH_CPP_LOG_LEVEL": base.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        **extra,
    }

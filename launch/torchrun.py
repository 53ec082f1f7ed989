"""The command and the environment that start a program under torchrun; pure, so a test can read them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RENDEZVOUS = "keep_alive_interval=5,keep_alive_max_attempt=120,last_call_timeout=3,join_timeout={join_s}"
"""Whole seconds. An agent takes another for dead whose sign of life is older than the product of the first two by its
own clock, and goes on alone: so clocks may be ten minutes apart. That an agent is lost is noticed by its ranks, or by
the scheduler; none waits for these signs."""
JOIN_S = 60
JOIN_NODES_S = 600
"""Many nodes that import torch from one file server start minutes apart."""


@dataclass(frozen=True)
class Meeting:
    """Where and under what name the agents of one start meet; of one machine at a port that the store chooses."""

    nodes: int = 1
    endpoint: str = "127.0.0.1:0"
    """Address and port of the head node. Port 0: a free one, so two jobs on one machine never meet."""
    address: str = "127.0.0.1"
    """Of this node, as the others reach it."""
    is_head: bool | None = None
    """This node keeps the store; None leaves it to torchrun, which compares names and errs where there are several."""
    id: str = ""
    """Changes with every start: what is left of an earlier one must not join."""


def trainer(url: str, plugins: Sequence[str] = ()) -> list[str]:
    """What trains as `url`/config.yaml says.

    Plug-in packages stand on the command line and not in the folder, so that a run folder from elsewhere cannot run
    code.
    """
    return ["-m", "everstep.trainer", "--frozen", url, *(["--plugins", ",".join(plugins)] if plugins else [])]


def command(url: str, nproc: int, grace_s: int, plugins: Sequence[str] = (), restarts: int = 0) -> list[str]:
    """The argv that trains on this machine alone; one process needs no torchrun, which saves its start-up."""
    if nproc == 1:
        return [sys.executable, *trainer(url, plugins)]
    return agent(trainer(url, plugins), nproc, grace_s, Meeting(id=url.rsplit("/", 1)[-1]), restarts)


def agent(program: Sequence[str], nproc: int, grace_s: int, meeting: Meeting, restarts: int = 0) -> list[str]:
    """The argv of this node's torchrun; `program` is a script, or a module after -m, with its arguments.

    `restarts` is torchrun's own budget: we leave it at 0 and start again ourselves, because torchrun would also repeat
    a run that must not be repeated.
    """
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
        f"--log-dir={os.devnull}",  # else it makes a folder for each start, and leaves it there
        f"--max-restarts={restarts}",
        *program,
    ]


def _settings(meeting: Meeting) -> str:
    settings = RENDEZVOUS.format(join_s=JOIN_S if meeting.nodes == 1 else JOIN_NODES_S)
    return settings if meeting.is_head is None else f"{settings},is_host={str(meeting.is_head).lower()}"


def environment(base: Mapping[str, str], threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment: the caller's, what torchrun needs, and what the job adds."""
    return {
        **base,
        # torchrun keeps one store for all restarts, and gloo then reads addresses of the dead: a fresh one each time.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Set in any case: torchrun else sets 1 and says so in a paragraph.
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        # Its warnings of a peer that has gone are pages of stack frames; errors are shown.
        "TORCH_CPP_LOG_LEVEL": base.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        **extra,
    }

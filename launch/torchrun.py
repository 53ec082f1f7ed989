"""Command line and environment of a program under torchrun: pure functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everstep.rank_env import FIXED_HASH_SEED, HASH_SEED

JOIN_S = 60
"""Seconds to wait for all nodes of a start."""
JOIN_NODES_S = 600
"""Longer for many nodes, which import torch from one file server and start minutes apart."""


@dataclass(frozen=True)
class Rendezvous:
    """Rendezvous of the agents of one job start; the default is for a single agent, which needs no port."""

    nodes: int = 1
    endpoint: str = "here"
    """Address and port at which the head node hosts the store."""
    rank: int = 0
    """Index of this node; node 0 is the head."""
    id: str = ""
    """Different for each start: processes left from an earlier one must not join."""


def trainer(url: str, plugins: Sequence[str] = (), config_digest: str = "") -> list[str]:
    """Return the trainer's arguments for `url`/config.yaml.

    The plug-in packages and the digest of the config are on the command line: a user who can only write the folder can
    neither run code nor change the config of a start.
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
        "everstep.trainer.run_torchrun",  # torchrun itself, less noisy when a worker fails
        f"--nnodes={meeting.nodes}",
        f"--nproc-per-node={nproc}",
        "--rdzv-backend=everstep",  # our own: torch's unpickles data that other users can write
        f"--rdzv-endpoint={meeting.endpoint}",
        f"--rdzv-id={meeting.id}",
        f"--rdzv-conf={_settings(program, meeting)}",
        "--monitor-interval=0.1",
        f"--shutdown-timeout={grace_s}",
        f"--log-dir={os.devnull}",  # otherwise it creates a folder for each start and never removes it
        "--max-restarts=0",  # the launcher restarts: torchrun would also restart a run that must not be
        *program,
    ]


def _settings(program: Sequence[str], meeting: Rendezvous) -> str:
    wait_s = JOIN_S if meeting.nodes == 1 else JOIN_NODES_S
    kind = "trainer" if list(program[:2]) == ["-m", "everstep.trainer"] else "script"
    return f"rank={meeting.rank},join_timeout={wait_s},program={kind}"


def environment(base: Mapping[str, str], threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the trainer's environment: the caller's, torchrun's settings and the job's additions."""
    return {
        **base,
        # For torchruns that a script starts: one store over restarts would have addresses of dead ranks.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Always set: otherwise torchrun sets 1 and prints a paragraph.
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        # All ranks and starts iterate over a set of strings, a vocabulary say, in one order.
        HASH_SEED: base.get(HASH_SEED) or FIXED_HASH_SEED,
        # Its warnings about a lost peer are pages of stack frames; errors are still shown.
        "TORCH_CPP_LOG_LEVEL": base.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        **extra,
    }
